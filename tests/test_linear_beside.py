"""A base layer in a CUDA graph, by lora_linear or between lora_fork and lora_join_: the shrink
begins before the base layer's last kernel has ended."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from generators import NAN, generator, make_batch, random_slots
from linear_site import Site, check_chain
from numerics import assert_same_bits
from test_on_device import capture

RANKS = [16, 3, 0, 64, 8]

pytestmark = pytest.mark.gpu


class Forked(Site):
    """A site whose base layer is no plain product: two kernels."""

    streamed_tokens = 0

    def __call__(self, x: Tensor, plan: Tensor, **options: Any) -> Tensor:
        return self.forked(x, plan, lambda x: self.base(x) * 2, **options)


KINDS = pytest.mark.parametrize("kind", [Site, Forked])


def make_site(
    in_features: int,
    slices: list[int],
    dtype: torch.dtype = torch.bfloat16,
    ranks: list[int] = RANKS,
    bias: bool = False,
    kind: type[Site] = Site,
) -> Site:
    return kind(
        dtype, "cuda", in_features=in_features, slices=slices, extra=0, bias=bias, ranks=ranks
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [33, 48, 100, 256, 300])
def test_one_behind_the_other(dtype: torch.dtype, num_tokens: int) -> None:
    shapes = [(2048, [9216]), (9216, [1024, 512]), (1536, [1024, 512, 512])]
    check_chain([make_site(k, slices, dtype) for k, slices in shapes], num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 8, 20, 100, 256, 300])
def test_other_base_layers_one_behind_the_other(num_tokens: int) -> None:
    shapes = [(2048, [9216]), (9216, [1024, 512]), (1536, [1024, 512, 512])]
    check_chain([make_site(k, slices, kind=Forked) for k, slices in shapes], num_tokens)


@pytest.mark.parametrize("ranks", [[16] * 32, [16], [8, 0, 16]], ids=["many", "one", "few"])
def test_ranks_of_one_step(ranks: list[int]) -> None:
    shapes = [(1024, [14336, 14336]), (28672, [1024])]
    check_chain([make_site(k, slices, ranks=ranks) for k, slices in shapes], 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [[64], [33, 0, 128]], ids=["one", "few"])
def test_wide_tiles(ranks: list[int], dtype: torch.dtype) -> None:
    shapes = [(6144, [4096]), (4096, [14336, 14336]), (28672, [6144])]
    check_chain([make_site(k, slices, dtype, ranks=ranks) for k, slices in shapes], 250)


@KINDS
@pytest.mark.parametrize("mix", ["nobody", "one", "all"])
@pytest.mark.parametrize(("in_features", "width"), [(8192, 14336), (28672, 1024)])
def test_what_comes_next_waits_for_the_product(
    in_features: int, width: int, mix: str, kind: type[Site]
) -> None:
    """Also where none of the adapters' thread blocks has anything to wait for, and where the
    product's last kernel is a reduction."""
    site = make_site(in_features, [width], bias=True, kind=kind)
    slots = {"nobody": [-1] * 200, "one": [-1] * 199 + [0], "all": [0] * 200}[mix]
    x, plan = site.x(200), make_batch(slots, len(RANKS), "cuda").plan
    results: list[torch.Tensor] = []

    def step() -> None:
        y = site(x, plan)
        results[:] = [y, y.clone()]
        x.zero_()

    clean = x.clone()
    graph = capture(step)
    for _ in range(5):
        for result in results:
            result.fill_(NAN)
        x.copy_(clean)
        graph.replay()
        want = site(clean, plan)
        for result in results:
            assert_same_bits(result, want)
        assert not x.any()


def test_temporary_memory_of_the_product() -> None:
    """torch copies such an x for its product, and the copy's memory is free again in the capture
    when the shrink begins, which the product is still reading."""
    site = make_site(4096, [6144])
    slots = random_slots(150, len(RANKS), generator("strided"))
    plan = make_batch(slots, len(RANKS), "cuda").plan
    x = torch.stack([site.x(3, 50), site.x(3, 50)], dim=1)[:, 0]  # rows of no one stride
    want = site(x, plan)
    results: list[torch.Tensor] = []
    graph = capture(lambda: results.__setitem__(slice(None), [site(x, plan) for _ in range(3)]))
    for _ in range(5):
        graph.replay()
        for result in results:
            assert_same_bits(result, want)


class EdgeData(ctypes.Structure):
    """cudaGraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_uint8),
        ("to_port", ctypes.c_uint8),
        ("type", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 5),
    )


LAUNCH_COMPLETION = 2  # cudaGraphKernelNodePortLaunchCompletion


def edges_of(call: Callable[[], object]) -> list[int]:
    """Where the edges of a graph of `call` lead from: the ports of their kernels."""
    call()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    major = int(torch.version.cuda.split(".")[0])
    runtime = ctypes.CDLL(f"libcudart.so.{major}")
    get_edges = getattr(runtime, "cudaGraphGetEdges" + ("_v2" if major < 13 else ""))
    count = ctypes.c_size_t(100)
    nodes = (ctypes.c_void_p * count.value)()
    edges = (EdgeData * count.value)()
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    assert get_edges(raw, nodes, nodes, edges, ctypes.byref(count)) == 0
    assert count.value < 100
    return [edges[i].from_port for i in range(count.value)]


def edges_from_a_launch(call: Callable[[], object]) -> int:
    """Those that lead from where the last thread block of a kernel begins."""
    return edges_of(call).count(LAUNCH_COMPLETION)


def test_the_shrink_begins_when_the_last_kernel_of_the_base_layer_has() -> None:
    site = make_site(2048, [14336])  # tiles enough that the product does not divide K
    plan = make_batch([0, 1, 3, 4] * 50, len(RANKS), "cuda").plan
    x, y = site.x(200), torch.zeros(200, 14336, dtype=torch.bfloat16, device="cuda")
    bases = {"product": site.base, "two": lambda x: site.base(x) * 2, "one": lambda _: y.mul_(2)}
    calls = {name: lambda base=base: site.forked(x, plan, base) for name, base in bases.items()}
    calls["linear"] = lambda: site(x, plan)
    calls["overlap"] = lambda: site(x, plan, overlap=True)
    assert {name: edges_from_a_launch(call) for name, call in calls.items()} == dict.fromkeys(
        calls, 1
    )


def test_the_shrink_begins_beside_a_product_that_ends_in_a_reduction() -> None:
    """Two kernels, of which the second starts early; the expand waits for both, and the shrink."""
    site = make_site(28672, [1024])
    plan, x = make_batch([0, 1, 3, 4] * 50, len(RANKS), "cuda").plan, site.x(200)
    if len(edges_of(lambda: site.base(x))) != 1:
        pytest.skip("this cuBLAS does not divide K of such a product")
    for call in (lambda: site(x, plan), lambda: site.forked(x, plan)):
        assert edges_from_a_launch(call) == 2


def test_it_waits_where_that_is_no_kernel() -> None:
    site = make_site(2048, [9216])
    plan = make_batch([0, 1, 3] * 16, len(RANKS), "cuda").plan
    x, y = site.x(48), torch.zeros(48, 9216, dtype=torch.bfloat16, device="cuda")
    z = torch.empty_like(y)
    # The copy, the shrink, and the expand, which starts early as the shrink did not.
    edges = edges_of(lambda: site.forked(x, plan, lambda _: z.copy_(y)))
    assert edges == [0, LAUNCH_COMPLETION]
