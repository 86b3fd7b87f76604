"""wrap: a mixed batch through a Hugging Face model gives what PEFT gives for each row's adapter."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_ext
from generators import on_devices
from lora_ext import LoRABatch
from lora_ext.layers import LoRALinear, LoRAModule, RowPlans
from tiny_models import (
    MAX_RANK,
    MODELS,
    assert_agrees,
    peft,
    peft_model,
    save_adapter,
    save_adapters,
    tiny_model,
)

ROWS = ["attention", None, "everything", "patterns", "head", "embedding", None, "attention"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by waiting for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT's directories of all adapters, which fit every one of the models."""
    return save_adapters(tiny_model(), tmp_path_factory.mktemp("adapters"))


def own_directories(model: Any, tmp_path: Path, wanted: list[str]) -> dict[str, Path]:
    return {name: path for name, path in save_adapters(model, tmp_path).items() if name in wanted}


def wrapped(model: Any, directories: dict[str, Path], **options: Any) -> lora_ext.LoRAModel:
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=6, max_rank=MAX_RANK, **options)
    for name, directory in directories.items():
        lora.load_adapter(name, directory)
    return lora


def prompts(rows: int = len(ROWS), tokens: int = 9, device: str = "cpu") -> dict[str, Any]:
    """Random prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 128, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {
        "input_ids": (ids * mask).to(device),
        "attention_mask": mask.to(device),
    }


def expected_rows(
    model: Any, directories: dict[str, Path], rows: list[str | None], call: Any
) -> list[Any]:
    """Call PEFT with the whole batch once per adapter, and keep the rows that have it."""
    results = {}
    with torch.no_grad():
        for name in dict.fromkeys(rows):
            results[name] = call(peft_model(model, directories[name] if name else None))
    return [results[name][i] for i, name in enumerate(rows)]


@on_devices
@pytest.mark.parametrize("kind", MODELS)
def test_every_row_is_what_peft_computes(kind: str, device: str, tmp_path: Path) -> None:
    model = tiny_model(kind, device)
    directories = save_adapters(model, tmp_path)
    lora = wrapped(model, directories)
    batch = prompts(device=device)

    with torch.no_grad():
        ours = lora(**batch, adapters=ROWS).logits
        base = model(**batch).logits
    theirs = expected_rows(model, directories, ROWS, lambda m: m(**batch).logits)

    for i, name in enumerate(ROWS):
        if name is None:
            assert torch.equal(ours[i], base[i])
        else:
            assert_agrees(ours[i], theirs[i])
            assert (theirs[i] - base[i]).norm() > 0.01 * base[i].norm()  # the adapter matters


@on_devices
def test_generate_greedy(device: str, directories: dict[str, Path]) -> None:
    model = tiny_model(device=device)
    batch = prompts(device=device)
    options = {"max_new_tokens": 6, "do_sample": False}

    ours = wrapped(model, directories).generate(**batch, adapters=ROWS, **options)
    theirs = expected_rows(model, directories, ROWS, lambda m: m.generate(**batch, **options))

    assert torch.equal(ours, torch.stack(theirs))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"use_cache": False, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False, "disable_compile": True},
    ],
    ids=["beams", "sequences", "no cache", "static cache"],
)
def test_generate_passes_options_on(options: Any, directories: dict[str, Path]) -> None:
    model = tiny_model()
    rows = ["everything", None, "patterns", "attention"]
    batch = prompts(len(rows))
    options = {"max_new_tokens": 4, **options}
    per_row = options.get("num_return_sequences", 1)

    ours = wrapped(model, directories).generate(**batch, adapters=rows, **options)
    theirs = expected_rows(
        model,
        directories,
        rows,
        lambda m: m.generate(**batch, **options).unflatten(0, (len(rows), per_row)),
    )

    assert torch.equal(ours, torch.cat(theirs))


@pytest.mark.parametrize("kept", [1, 4, [0, 5, 2]])
def test_pruned_lm_head_has_each_rows_adapter(kept: Any, directories: dict[str, Path]) -> None:
    model = tiny_model()
    rows = ["head", None, "everything", "attention", "head"]
    lora = wrapped(model, directories)
    batch = prompts(len(rows))
    logits_to_keep = torch.tensor(kept) if isinstance(kept, list) else kept
    chosen = kept if isinstance(kept, list) else slice(-kept, None)

    with torch.no_grad():
        pruned = lora(**batch, adapters=rows, logits_to_keep=logits_to_keep).logits
        full = lora(**batch, adapters=rows).logits

    assert_agrees(pruned, full[:, chosen])


def test_tied_embeddings_are_adapted_apart(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    rows = ["head", "embedding", None]
    directories = own_directories(model, tmp_path, ["head", "embedding"])
    batch = prompts(len(rows))

    with torch.no_grad():
        ours = wrapped(model, directories)(**batch, adapters=rows).logits
    theirs = expected_rows(model, directories, rows, lambda m: m(**batch).logits)

    for mine, wanted in zip(ours, theirs, strict=True):
        assert_agrees(mine, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype: torch.dtype, directories: dict[str, Path]) -> None:
    rows = ["attention", "patterns", None]
    batch = prompts(len(rows))
    only = {name: directories[name] for name in rows if name}
    with torch.no_grad():
        exact = wrapped(tiny_model(), only)(**batch, adapters=rows).logits
        ours = wrapped(tiny_model(dtype=dtype), only)(**batch, adapters=rows).logits.float()

    for mine, wanted in zip(ours, exact, strict=True):
        assert (mine - wanted).norm() < 10 * torch.finfo(dtype).eps * wanted.norm()


def test_scalings_stay_float32_when_the_model_is_cast(directories: dict[str, Path]) -> None:
    lora = wrapped(tiny_model(), {"patterns": directories["patterns"]})
    layer = lora.model.model.layers[0].self_attn.q_proj
    before = layer.scalings.clone()

    lora.model.to(torch.bfloat16)

    assert layer.lora_a.dtype == torch.bfloat16
    assert layer.scalings.dtype == torch.float32 and torch.equal(layer.scalings, before)


@on_devices
def test_load_replace_remove_between_forwards(
    device: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    """Another row's result never changes, and a reused slot keeps nothing of what it held."""
    model = tiny_model(device=device)
    other = save_adapter(tiny_model(), tmp_path, seed=9, r=2, target_modules=["q_proj", "lm_head"])
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=2, max_rank=MAX_RANK)
    lora.load_adapter("kept", directories["attention"])
    lora.load_adapter("changing", directories["everything"])
    batch = prompts(2, device=device)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = lora(**batch, adapters=["kept", "changing"]).logits
        return result

    kept, first = logits()
    slot = lora.adapters["changing"].slot
    for layer in lora.pool.layers:  # what lies behind a smaller adapter is never read
        layer.lora_a[slot] = float("nan")
        layer.lora_b[slot] = float("nan")
    lora.load_adapter("changing", other, replace=True)
    assert lora.adapters["changing"].slot == slot
    row, second = logits()
    assert torch.equal(row, kept)
    (wanted,) = expected_rows(model, {"new": other}, ["new"], lambda m: m(**batch).logits[1:])
    assert_agrees(second, wanted)

    lora.remove_adapter("changing")
    lora.load_adapter("changing", directories["everything"])
    row, third = logits()
    assert torch.equal(row, kept) and torch.equal(third, first)


def test_use_gives_adapters_to_the_bare_model(directories: dict[str, Path]) -> None:
    lora = wrapped(tiny_model(), directories)
    batch = prompts(2)
    with torch.no_grad():
        base = lora.model(**batch).logits
        one = lora(**batch, adapters=["attention", None]).logits
        two = lora(**batch, adapters=[None, "head"]).logits
        with lora.use(["attention", None]):
            assert torch.equal(lora.model(**batch).logits, one)
            with lora.use([None, "head"]):
                assert torch.equal(lora(**batch).logits, two)
            assert torch.equal(lora.model(**batch).logits, one)
            assert lora.adapters["attention"].in_use and not lora.adapters["head"].in_use
            with pytest.raises(RuntimeError, match="'attention' is in use"):
                lora.remove_adapter("attention")
            lora.remove_adapter("head")
            lora.load_adapter("attention", directories["head"], replace=True)
            assert torch.equal(lora.model(**batch).logits[0], lora(**batch).logits[0])
            assert not torch.equal(lora.model(**batch).logits[0], one[0])
        assert torch.equal(lora.model(**batch).logits, base)
    assert not lora.adapters["attention"].in_use


def test_use_counts_for_its_own_thread(directories: dict[str, Path]) -> None:
    lora = wrapped(tiny_model(), directories)
    batch = prompts(2)
    results = []

    def call_base() -> None:
        with torch.no_grad():
            results.append(lora.model(**batch).logits)

    call_base()
    with lora.use(["attention", "head"]):
        thread = threading.Thread(target=call_base)
        thread.start()
        thread.join()
    assert torch.equal(results[0], results[1])


def test_counters(directories: dict[str, Path]) -> None:
    lora = wrapped(tiny_model(), directories)
    with torch.no_grad():
        lora(**prompts(3), adapters=["head", None, "head"])
        lora(**prompts(3), adapters=["head", "attention", None])
    assert (lora.adapters["head"].num_batches, lora.adapters["head"].num_rows) == (2, 3)
    assert (lora.adapters["attention"].num_batches, lora.adapters["attention"].num_rows) == (1, 1)
    assert (lora.adapters["patterns"].num_batches, lora.adapters["patterns"].rank) == (0, 12)


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (["nope", None], KeyError, "no adapter named 'nope' is loaded; loaded: 'attention'"),
        (["attention"], ValueError, "the batch has 2 rows, adapters has 1 entries"),
        ("attention", ValueError, "must be a list"),
        ([], ValueError, "2 rows, adapters has 0"),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "generate"])
def test_wrong_rows_are_refused_before_any_work(
    adapters: Any,
    error: type[Exception],
    message: str,
    method: str,
    directories: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = wrapped(tiny_model(), {"attention": directories["attention"]})
    calls: list[object] = []
    for layer in lora.pool.layers:
        monkeypatch.setattr(layer, "forward", calls.append)
    with pytest.raises(error, match=message):
        getattr(lora, method)(**prompts(2), adapters=adapters)
    assert not calls and not lora.adapters["attention"].in_use


def test_a_batch_that_is_no_multiple_of_the_rows(directories: dict[str, Path]) -> None:
    lora = wrapped(tiny_model(), directories)
    with lora.use(["attention", None]), torch.no_grad():
        with pytest.raises(ValueError, match="3 rows, which is no multiple of the 2"):
            lora.model(**prompts(3))
        with pytest.raises(ValueError, match="expected \\[rows, tokens\\]"):
            lora.model.model.layers[0].self_attn.q_proj(torch.zeros(4, 64))


def test_grad_is_refused_and_inference_mode_is_not(directories: dict[str, Path]) -> None:
    lora = wrapped(tiny_model(), directories)
    batch = prompts(2)
    with pytest.raises(RuntimeError, match="are for inference"):
        lora(**batch, adapters=["attention", None])
    lora(**batch, adapters=[None, None]).logits.sum().backward()  # the base model's own
    with torch.no_grad():
        wanted = lora(**batch, adapters=["attention", None]).logits
    with torch.inference_mode():
        lora.load_adapter("again", directories["attention"])
        assert torch.equal(lora(**batch, adapters=["again", None]).logits, wanted)
    with torch.no_grad():
        assert torch.equal(lora(**batch, adapters=["again", None]).logits, wanted)


def test_layers_without_work_launch_nothing(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = wrapped(tiny_model(), {"attention": directories["attention"]})
    calls = []
    apply_ = lora_ext.ops.lora_apply_
    monkeypatch.setattr(
        lora_ext.ops, "lora_apply_", lambda *args, **kw: calls.append(1) or apply_(*args, **kw)
    )
    with torch.no_grad():
        lora(**prompts(2), adapters=[None, None])
        assert not calls
        lora(**prompts(2), adapters=["attention", None])
        assert len(calls) == 4  # q_proj and v_proj of two layers


def test_target_modules(directories: dict[str, Path]) -> None:
    lora = lora_ext.wrap(
        tiny_model(), max_adapters=1, max_rank=4, target_modules=["q_proj", "layers.1.mlp.up_proj"]
    )
    names = {n for n, module in lora.model.named_modules() if isinstance(module, LoRAModule)}
    assert names == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    with pytest.raises(lora_ext.AdapterError, match=r"v_proj.*no layer of this name"):
        lora.load_adapter("attention", directories["attention"])


def test_wrap_refuses(directories: dict[str, Path]) -> None:
    def wrap(model: Any, **options: Any) -> None:
        lora_ext.wrap(model, **{"max_adapters": 1, "max_rank": 4, **options})

    model = tiny_model()
    with pytest.raises(ValueError, match="'no_proj', which names no layer"):
        wrap(model, target_modules=["q_proj", "no_proj"])
    with pytest.raises(ValueError, match="max_rank >= 1"):
        wrap(model, max_rank=0)
    with pytest.raises(ValueError, match="on one device"):
        wrap(copy.deepcopy(model).to("meta"))
    with pytest.raises(ValueError, match="PEFT"):
        wrap(peft_model(model, directories["attention"]))
    with pytest.raises(ValueError, match="PEFT"):
        wrap(peft_model(model, directories["attention"]).base_model.model)
    wrap(model)
    with pytest.raises(ValueError, match="wrapped already"):
        wrap(model)


def test_dora_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = tiny_model()
    dora = save_adapter(model, tmp_path, r=4, target_modules=["q_proj"], use_dora=True)
    lora = wrapped(model, {})
    with pytest.raises(
        lora_ext.AdapterError, match="use_dora = True is not supported: DoRA rescales"
    ):
        lora.load_adapter("dora", dora)
    assert not lora.adapters


def test_flattened_tokens_by_a_batch_plan() -> None:
    """An engine routes a LoRABatch of requests: one plan for every layer, tokens flattened."""
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 6)
    layer = LoRALinear(base, num_slots=3, max_rank=4)
    lora_a, lora_b = torch.randn(2, 8), torch.randn(6, 2)
    layer.write_slot(2, lora_a, lora_b)
    layer.set_slot(2, 2, 0.5)
    batch = LoRABatch(16, 3)
    batch.update([2, -1, 2], seg_lens=[3, 2, 1])
    x = torch.randn(6, 8)

    with layer.routing.using(batch), torch.no_grad():
        y = layer(x)

    wanted = base(x).detach()
    routed = [0, 1, 2, 5]
    assert torch.equal(y[3:5], wanted[3:5])
    assert_agrees(y[routed], wanted[routed] + 0.5 * x[routed] @ lora_a.T @ lora_b.T)


def test_more_shapes_than_plans_are_kept() -> None:
    """Buffers of old shapes serve again, for smaller and larger ones."""
    plans = RowPlans([2, -1, 0], num_slots=3, device=torch.device("cpu"))
    for tokens in [1, *range(2 * RowPlans.KEPT_SHAPES), 100, 3, 50, 1]:
        plan = plans.plan(torch.Size((6, tokens)))
        assert plan is not None
        reference = LoRABatch(6 * tokens, 3)
        reference.update([2, 2, -1, -1, 0, 0], seg_lens=[tokens] * 6)
        lora_a = torch.eye(3)[:, :, None].expand(3, 3, 1)  # slot l has 1 in row l: x times one-hot
        xa = [
            lora_ext.ops.lora_shrink(
                torch.ones(6 * tokens, 1),
                [lora_a.contiguous()],
                torch.full((3,), 3, dtype=torch.int32),
                torch.ones(3),
                each,
                max_rank=3,
            )
            for each in (plan, reference.plan)
        ]
        assert torch.equal(*xa)


def test_rows_of_peft_itself_mixed_agree(directories: dict[str, Path]) -> None:
    """PEFT's own mixed batch, its adapter_names, is one more oracle."""
    model = tiny_model()
    names = ["attention", "patterns"]
    mixed = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), str(directories["attention"]), adapter_name="attention"
    ).eval()
    mixed.load_adapter(str(directories["patterns"]), adapter_name="patterns")
    rows = ["patterns", None, "attention", "patterns"]
    batch = prompts(len(rows))

    with torch.no_grad():
        theirs = mixed(**batch, adapter_names=[name or "__base__" for name in rows]).logits
        ours = wrapped(model, {n: directories[n] for n in names})(**batch, adapters=rows).logits

    assert_agrees(ours, theirs)
