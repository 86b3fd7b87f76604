"""The benchmarks: shapes, problems, the floor, and small runs of the command on the CPU."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from conftest import why_no_gpu
from lora_ext.benchmarking import end_to_end, grids, layer, report
from lora_ext.benchmarking.case import Candidate, Case, Cost, Problem, Setting, relative_error
from lora_ext.benchmarking.decoder import Decoder
from lora_ext.benchmarking.dense import APPLY, EXPAND, SHRINK, DenseProblem
from lora_ext.benchmarking.embedding import EmbeddingProblem
from lora_ext.benchmarking.floor import H200, Limits
from lora_ext.benchmarking.moe import W2, W13, MoeProblem
from lora_ext.benchmarking.registry import MODELS
from lora_ext.benchmarking.runner import Measured, Row, measure
from lora_ext.benchmarking.timing import time_together
from lora_ext.benchmarking.workload import make_workload
from lora_ext.cli import main

CPU = torch.device("cpu")
SMALL = replace(Setting.of(CPU, torch.float32), max_sets=3)
TINY = MODELS["tiny"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Times mean nothing here, and threads that wait for each other take long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- shapes


def parameters_of_layer(name: str) -> int:
    """Weights of a decoder layer's matrices."""
    model = MODELS[name]
    total = sum(site.in_features * site.out_features for site in model.sites.values())
    if model.experts is not None:
        experts = model.experts
        total += 3 * experts.num_experts * experts.hidden_size * experts.intermediate_size
    return total


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.8),
        ("qwen3-30b-a3b", 30.5),
        ("mixtral-8x7b", 46.7),
        ("gpt-oss-20b", 20.9),
        ("gpt-oss-120b", 116.8),
    ],
)
def test_shapes_add_up_to_the_published_number_of_parameters(name: str, billions: float) -> None:
    model = MODELS[name]
    embeddings = 2 * model.vocab_size * model.hidden_size
    total = model.num_layers * parameters_of_layer(name) + embeddings
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def test_sites_have_the_columns_of_their_slices() -> None:
    for model in MODELS.values():
        assert model.name == next(name for name, m in MODELS.items() if m is model)
        for site in model.sites.values():
            widths = [columns.stop - columns.start for columns in site.columns]
            assert widths == list(site.output_slices)
            assert site.columns[-1].stop == site.out_features
        assert model.sites["o"].out_features == model.sites["qkv"].in_features


# ---- workloads


@pytest.mark.parametrize("mix", ["even", "zipf", "segments"])
def test_a_workload_uses_the_adapters_it_is_asked_for(mix: str) -> None:
    workload = make_workload(96, 5, "mixed", mix)
    assert workload.num_tokens == 96 and workload.num_slots == 8
    assert list(workload.tokens_of) == list(range(5))
    assert sorted(t for tokens in workload.tokens_of.values() for t in tokens) == list(range(96))
    assert sum(length for length, _ in workload.segments) == 96
    assert len(workload.segments) == (5 if mix == "segments" else 96)
    assert set(workload.ranks) == {8, 16, 32, 64} and workload.max_rank == 64
    assert make_workload(96, 5, "mixed", mix) == workload


def test_segments_are_uneven_runs_even_where_there_are_few_tokens() -> None:
    assert [n for n, _ in make_workload(512, 4, "16", "segments").segments] != [128] * 4
    assert len(make_workload(4, 4, "16", "segments").segments) == 4
    assert make_workload(8, 0, "16", "even").tokens_of == {}
    with pytest.raises(ValueError, match="mix is 'odd'"):
        make_workload(8, 1, "16", "odd")


# ---- the floor


def test_floor_is_the_launch_and_the_bytes_or_the_operations() -> None:
    assert H200.floor_us(Cost(0, 0)) == pytest.approx(1.1)
    assert H200.floor_us(Cost(4_200_000, 0)) == pytest.approx(2.1)
    assert H200.floor_us(Cost(0, 7_500_000_000)) == pytest.approx(10.0)
    assert Limits(0.0, 1e12, 1e12, "").floor_us(Cost(10**6, 3 * 10**6)) == pytest.approx(3.0)


def test_cost_counts_true_ranks_and_only_adapters_in_use() -> None:
    site = TINY.sites["qkv"]
    workload = make_workload(2, 2, "mixed", "even")  # ranks 8 and 16 in use of 8, 16, 32, 64, ...
    k, n = site.in_features, site.out_features
    weights = (8 + 16) * (3 * k + n)
    apply = DenseProblem("", site, workload).cost(torch.bfloat16)
    assert apply.bytes == 2 * (weights + 2 * (k + 2 * n))
    assert apply.operations == 2 * weights
    shrink = DenseProblem("", site, workload, SHRINK).cost(torch.bfloat16)
    expand = DenseProblem("", site, workload, EXPAND).cost(torch.bfloat16)
    intermediate = 4 * 3 * (8 + 16)
    assert shrink.bytes + expand.bytes == apply.bytes + 2 * intermediate
    assert shrink.operations + expand.operations == apply.operations
    nobody = DenseProblem("", site, make_workload(2, 0, "16", "even"))
    assert nobody.cost(torch.bfloat16) == Cost(0, 0)


def test_results_of_the_grid_have_the_bytes_of_the_problem() -> None:
    problem = next(p for p in grids.decode() if p.name == "down T8 distinct r16")
    assert problem.cost(torch.bfloat16).bytes == 2 * (8 * 16 * 18432 + 8 * (14336 + 2 * 4096))


def test_every_grid_has_distinct_problems_that_cost_something() -> None:
    for name, grid in grids.GRIDS.items():
        problems = grid()
        keys = {(p.grid, p.name) for p in problems}
        assert len(keys) == len(problems) > 0, name
        assert all(p.cost(torch.bfloat16).bytes > 0 for p in problems)


# ---- problems: every provider is right, and a wrong one is found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [APPLY, SHRINK, EXPAND])
@pytest.mark.parametrize(
    "batch", [(20, 4, "mixed", "zipf"), (40, 3, "16", "segments"), (6, 0, "16", "even")]
)
def test_dense_providers_agree(
    batch: tuple[int, int, str, str], op: str, dtype: torch.dtype
) -> None:
    setting = replace(SMALL, dtype=dtype)
    problem = DenseProblem("test", TINY.sites["qkv"], make_workload(*batch), op)
    row = measure(problem, setting, None, replays=1)
    assert not [m.note for m in row.providers.values() if m.failed]
    expected = {"lora_ext", "torch_loop"} | (
        {"torch_grouped"} if dtype == torch.bfloat16 else set()
    )
    timed = {name for name, measured in row.providers.items() if measured.us}
    assert expected <= timed
    assert row.providers["vllm"].note == "not installed"


@pytest.mark.parametrize("rank", ["8", "mixed"])
def test_embedding_providers_agree(rank: str) -> None:
    workload = make_workload(30, 3, rank, "segments")
    problem = EmbeddingProblem("test", TINY.vocab_size, TINY.hidden_size, workload)
    row = measure(problem, replace(SMALL, dtype=torch.bfloat16), None, replays=1)
    assert not [m.note for m in row.providers.values() if m.failed]
    assert row.us and row.best_other


@pytest.mark.parametrize("stage", [W13, W2])
@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_moe_providers_agree(stage: str, memory: int) -> None:
    """Also where there is memory for one set of weights only and experts are shifted instead."""
    experts = MODELS["tiny-moe"].experts
    assert experts is not None
    workload = make_workload(10, 3, "16", "zipf")
    problem = MoeProblem("test", "tiny-moe", experts, workload, stage)
    setting = replace(SMALL, dtype=torch.bfloat16, memory_bytes=memory)
    row = measure(problem, setting, None, replays=1)
    assert not [m.note for m in row.providers.values() if m.failed]
    assert row.providers["torch_loop"].us and row.providers["torch_grouped"].us
    if hasattr(torch.ops.lora_ext, "moe_lora_apply_"):
        assert row.us


def test_a_layer_with_lora_is_the_layer_plus_its_deltas() -> None:
    problem = layer.LayerProblem("test", TINY, make_workload(9, 3, "mixed", "even"))
    row = measure(problem, SMALL, None, replays=1)
    assert not [m.note for m in row.providers.values() if m.failed]
    assert {"base", "base_only", "linear_only", "lora_ext", "torch_loop"} <= {
        name for name, measured in row.providers.items() if measured.us
    }


class Faulty:
    """A problem with one provider that is right and others that are wrong in their own ways."""

    grid, name = "test", "faulty"

    def cost(self, dtype: torch.dtype) -> Cost:
        return Cost(1, 1)

    def prepare(self, setting: Setting) -> Case:
        right = torch.ones(4)

        def gives(value: torch.Tensor) -> Candidate:
            return Candidate(lambda i: value, lambda i: value, 2)

        def raises() -> Candidate:
            raise TypeError("an interface that changed")

        return Case(
            {
                "right": lambda: gives(right),
                "off": lambda: gives(right * 1.02),
                "nan": lambda: gives(right * float("nan")),
                "broken": raises,
            },
            lambda i, actual: relative_error(actual, right),
            1e-2,
            2,
        )


def test_a_wrong_result_has_no_time() -> None:
    problem: Problem = Faulty()
    row = measure(problem, SMALL, None, replays=1)
    assert [name for name, measured in row.providers.items() if measured.us] == ["right"]
    assert row.providers["off"].error == pytest.approx(0.02, rel=1e-3)
    assert all(row.providers[name].failed for name in ("off", "nan", "broken"))
    assert row.providers["broken"].note == "TypeError: an interface that changed"


# ---- reports and the command


def row(name: str, own: float | None, other: float | None, floor: float = 2.0) -> Row:
    providers = {
        "lora_ext": Measured(us=own),
        "other": Measured(us=other, note="" if other else "no"),
    }
    return Row("decode", name, 4000, 0, 2, floor, providers)


def test_table_and_summary() -> None:
    rows = [row("a", 4.0, 8.0), row("b", 8.0, 4.0), row("c", 4.0, None)]
    cells = report.line(rows[0], ["other"]).split()
    assert cells == ["a", "4.00", "1.00", "50.0", "0.50", "8.00e"]
    assert report.line(rows[2], ["other"]).split()[-2:] == ["-", "-"]
    (summary,) = report.summary(rows)
    assert (
        "3 problems" in summary
        and "1.00 \N{MULTIPLICATION SIGN} the best" in summary
        and "slowest 2.00" in summary
    )
    assert report.notes(rows) == ["other: no (c)"]


def test_bench_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    arguments = ["bench", "--grid", "smoke", "--device", "cpu", "--replays", "1"]
    assert main([*arguments, "--json", str(path), "--providers", "torch_loop,torch_sort"]) == 0
    out = capsys.readouterr().out
    assert re.search("problem +µs +GB/s +% of floor +\N{MULTIPLICATION SIGN} best", out)
    data = json.loads(path.read_text())
    assert data["machine"]["environment"]["torch"]["version"] == torch.__version__
    assert data["machine"]["device"] == "cpu" and data["machine"]["limits"] is None
    assert [r["name"] for r in data["rows"]] == [p.name for p in grids.smoke()]
    for r in data["rows"]:
        assert r["floor_us"] is None
        if r["grid"] != "moe":
            assert r["us"] > 0 and r["ratio"] > 0
            assert set(r["providers"]) <= {"lora_ext", "torch_loop", "torch_sort"}
            assert r["providers"]["lora_ext"]["error"] < 1e-5
        assert r["name"] in out


def test_bench_command_takes_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--model", "tiny", "--site", "o,down", "--tokens", "1,5", "--adapters", "1,4"]
    arguments = ["bench", "--device", "cpu", *shape, "--rank", "8,mixed", "--replays", "1"]
    assert main([*arguments, "--providers", "torch_loop", "--only", "^o"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([text for text in lines if text.startswith("o T")]) == 2 * 3
    assert not [text for text in lines if text.startswith("down T")]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model", "llama-9"],
        ["--site", "gate"],
        ["--tokens", "0"],
        ["--adapters", "x"],
        ["--rank", "sixteen"],
        ["--grid", "decode,nonsense"],
    ],
)
def test_bench_command_refuses_by_name(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--device", "cpu", *wrong]) == 2
    assert capsys.readouterr().err.startswith(f"lora-ext bench: {wrong[0]}")


@pytest.mark.gpu
def test_a_capture_that_fails_harms_no_other_candidate() -> None:
    device = torch.device("cuda")
    x = torch.ones(1000, device=device)
    y = torch.empty_like(x)
    candidates = {
        "synchronises": Candidate(lambda i: x.sum().item(), lambda i: x, 1),
        "fine": Candidate(lambda i: torch.add(x, 1, out=y), lambda i: y, 1),
        "eager": Candidate(lambda i: x.sum().item(), lambda i: x, 1, captured=False),
    }
    for _ in range(2):
        timings, failures = time_together(candidates, device, 3)
        assert set(timings) == {"fine", "eager"} and set(failures) == {"synchronises"}
        assert timings["fine"].captured and 0.1 < timings["fine"].us < 100
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.randn(100, device=device).isfinite().all() and (y == 2).all()


@pytest.mark.gpu
def test_a_gpu_run_is_captured_and_has_a_floor(tmp_path: Path) -> None:
    assert why_no_gpu() is None
    path = tmp_path / "result.json"
    assert main(["bench", "--grid", "smoke", "--replays", "3", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["machine"]["limits"]["bytes_per_s"] > 1e11
    for r in data["rows"]:
        assert r["floor_us"] > 1 and r["providers"]["lora_ext"]["captured"]
        assert r["us"] > 0.5


# ---- a model's step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_right_with_every_provider(dtype: torch.dtype) -> None:
    setting = replace(SMALL, dtype=dtype)
    decoder = Decoder.random(TINY, 2, CPU, dtype)
    decoder.start(batch=6, context=9)
    few, many = end_to_end.step_workloads(6, [1, 32], "8")
    assert few.num_slots == many.num_slots == 32
    adapters = end_to_end.Adapters(decoder, few)
    for workload in (few, many):
        problem = end_to_end.StepProblem("test", decoder, adapters, workload)
        result = measure(problem, setting, None, replays=1)
        assert not [m.note for m in result.providers.values() if m.failed]
        timed = {name for name, measured in result.providers.items() if measured.us}
        assert {"without", "base_only", "linear_only", "lora_ext", "torch_loop"} <= timed
        assert ("peft_one" in timed) == ("peft" in timed and workload is few)


def test_a_step_without_its_adapters_would_be_noticed() -> None:
    decoder = Decoder.random(TINY, 2, CPU, torch.float32)
    decoder.start(batch=6, context=9)
    (workload,) = end_to_end.step_workloads(6, [4], "8")
    adapters = end_to_end.Adapters(decoder, workload)
    problem = end_to_end.StepProblem("test", decoder, adapters, workload)
    with torch.no_grad():
        case = problem.prepare(SMALL)
        ids = torch.arange(6) * 7919 % TINY.vocab_size
        assert case.error(0, decoder.step(ids, decoder.base_linear)) > 0.3


# ---- the scripts beside them


def script(name: str) -> Any:
    """A script of benchmarks/ as a module; skips where the sources are not there."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    if not path.exists():
        pytest.skip("needs the source tree: benchmarks/ is not here")
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_plot_draws_every_problem_where_it_belongs(tmp_path: Path) -> None:
    plot = script("plot")
    path = tmp_path / "run.json"
    rows = [row("a", 4.0, 8.0), row("b", 4.0, 2.0), row("c", 3.0, None)]
    report.write(path, rows, {"device": "none"})
    points = plot.read(path)
    assert [(p.us, p.other, p.floor) for p in points] == [
        (4.0, 8.0, 2.0),
        (4.0, 2.0, 2.0),
        (3.0, None, 2.0),
    ]
    svg = ElementTree.fromstring(plot.draw(points, "a < b & c"))
    space = "{http://www.w3.org/2000/svg}"
    # Two speedups; three own and two other distances from the floor; two in the legend.
    assert len(svg.findall(f"{space}circle")) == 2 + 3 + 2 + 2
    texts = [text.text for text in svg.findall(f"{space}text")]
    assert "decode" in texts and "a < b & c" in texts and "3 problems" in texts
    assert "1.00\N{MULTIPLICATION SIGN}" in texts
    axis = plot.Axis(100.0, 0.5, 2.0)
    assert axis.at(0.5) == 100 and axis.at(1.0) == 100 + plot.PANEL / 2 and axis.at(9) == axis.at(2)


def test_plot_reads_the_committed_results() -> None:
    plot = script("plot")
    (path,) = (Path(plot.__file__).parent / "results").glob("h200_2026-11-22.csv")
    points = plot.read(path)
    assert {point.grid for point in points} == {"decode", "prefill", "moe", "embed"}
    ElementTree.fromstring(plot.draw(points, ""))


LOG = """\
[1/2] nvcc -Xptxas=-v x.cu
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8lora_ext6shrinkIfLi4EEEvNS_6ParamsEi' for 'sm_90a'
ptxas info    : Function properties for _ZN8lora_ext6shrinkIfLi4EEEvNS_6ParamsEi
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Function properties for some_callee
    64 bytes stack frame, 99 bytes spill stores, 99 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 12.021 ms
ptxas info    : Compiling entry function '_ZN8lora_ext4cuda4planEv' for 'sm_80'
ptxas info    : Function properties for _ZN8lora_ext4cuda4planEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 400 bytes cmem[0]
"""


def test_resources_of_a_build_log() -> None:
    resources = script("resources")
    first, second = resources.parse(LOG.splitlines())
    assert (first.architecture, first.registers, first.shared) == ("sm_90a", 40, 2048)
    assert (first.stack, first.spill_stores, first.spill_loads) == (8, 12, 16)
    assert (second.architecture, second.registers, second.shared) == ("sm_80", 32, 0)
    demangled = "void lora_ext::cuda::(anonymous namespace)::f<__nv_bfloat16, (int)4>(lora_ext::P)"
    assert resources.short(demangled) == "f<bf16, 4>"
    text = resources.table([first, second])
    assert "2 kernels, 1 with spills" in text and "| sm_90a | 40 | 12 + 16 | 2048 |" in text
