"""GEMMs that skip, in Triton: equal to dense ones, blind to what they skip, and launched by shapes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional

from pretended_cuda import CPU, PLACE, kernels  # noqa: E402

from calibration.devices import Operator  # noqa: E402
from calibration.devices.operators import PATTERNS, Arena, build, group_masks  # noqa: E402
from calibration.devices.skipping import grouped_by_loops, in_triton  # noqa: E402

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def triton() -> ModuleType:
    return kernels()  # type: ignore[no-any-return]


def _random(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(PLACE, dtype)


def _close(value: Any, reference: Any, tolerance: float) -> None:
    scale = max(1.0, float(reference.abs().max())) if reference.numel() else 1.0
    torch.testing.assert_close(value.double(), reference.double(), rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [0, 1, 17, 37])
def test_a_gathered_gemm_computes_the_rows_that_a_count_on_the_device_says(triton: Any, dtype: Any, count: int) -> None:
    x, weight, bias = (_random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((37, 100), (150, 100), (150,))))
    index = torch.randperm(37, generator=torch.Generator().manual_seed(1)).to(PLACE)
    number = torch.tensor([count], dtype=torch.int32, device=PLACE)
    dense = x.double() @ weight.double().t() + bias
    before = _random(37, 150, dtype=dtype, seed=3)
    rows, others = index[:count], index[count:]
    for add in (False, True):
        y = triton.gather_gemm(x, weight, index, number, bias, out=before.clone(), add=add)
        _close(y[rows], (dense + add * before.double())[rows], TOLERANCE[dtype])
        assert torch.equal(y[others], before[others])
    index[count:] = 10**6  # beyond the count nothing is read
    _close(triton.gather_gemm(x, weight, index, number, bias)[rows], dense[rows], TOLERANCE[dtype])


MASKS = {
    "random": lambda tokens, groups: torch.rand(tokens, groups, generator=torch.Generator().manual_seed(2)) < 0.4,
    "few": lambda tokens, groups: (torch.arange(tokens)[:, None] + torch.arange(groups)) % 3 == 0,
    "none": lambda tokens, groups: torch.zeros(tokens, groups, dtype=torch.bool),
    "all": lambda tokens, groups: torch.ones(tokens, groups, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("tokens", "groups", "width"), [(1, 4, 16), (70, 7, 12), (130, 3, 40)])
def test_grouped_gemms_equal_masked_dense_ones(
    triton: Any, dtype: Any, masks: str, tokens: int, groups: int, width: int
) -> None:
    mask, k, n = MASKS[masks](tokens, groups).to(PLACE), 50, groups * width
    x, weight, bias = (_random(*s, dtype=dtype, seed=i) for i, s in enumerate(((tokens, k), (n, k), (n,))))
    wide, tiles = mask.repeat_interleave(width, 1), triton.tiles_of(mask)
    dense = x.double() @ weight.double().t()
    y = triton.grouped_columns(x, weight, tiles, bias)
    _close(y, (dense + bias) * wide, TOLERANCE[dtype])
    outer = _random(n, 33, dtype=dtype, seed=4)
    _close(triton.grouped_features(y, outer, tiles), y.double() @ outer.double(), TOLERANCE[dtype])
    both = _random(2 * n, k, dtype=dtype, seed=5)
    gate, up = (x.double() @ both.double().t()).view(tokens, groups, 2, width).unbind(2)
    gated = (F.silu(gate) * up).flatten(1) * wide
    _close(triton.grouped_columns(x, both, tiles, gated=True), gated, TOLERANCE[dtype])


def test_what_no_token_of_a_tile_needs_is_not_read(triton: Any) -> None:
    tokens, groups, width = 128, 4, 16
    mask = torch.zeros(tokens, groups, dtype=torch.bool, device=PLACE)
    mask[:, 1], mask[::2, 3] = True, True
    tiles = triton.tiles_of(mask)
    assert tiles.edge == 64
    assert sorted(tiles.used.tolist()) == [1, 2]  # sorted by mask, one tile of two never meets group 3
    poisoned = _random(groups * width, 20).view(groups, width, 20)
    poisoned[[0, 2]] = torch.nan
    weight = poisoned.flatten(0, 1)
    y = triton.grouped_columns(_random(tokens, 20), weight, tiles)
    assert torch.isfinite(y).all()
    assert torch.isfinite(triton.grouped_features(y, weight, tiles)).all()


def test_tiles_bring_equal_masks_together_however_many_groups_there_are(triton: Any) -> None:
    patterns = torch.rand(5, 150, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = patterns[torch.randint(5, (300,), generator=torch.Generator().manual_seed(1))]
    ordered = mask[triton.tiles_of(mask).order]
    assert int((ordered[1:] != ordered[:-1]).any(1).sum()) == 4
    assert triton.tiles_of(mask).order.sort().values.tolist() == list(range(300))


class Grids:
    """In a kernel's place: notes the grids it is launched with."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        self.seen.append(grid)
        return lambda *_, **__: None


def test_launches_need_no_data(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = Grids()
    for name in ("_gathered", "_columns", "_features"):
        monkeypatch.setattr(triton, name, grids)
    for place in ("cpu", "meta"):  # meta tensors have shapes and no data
        x, weight = torch.zeros(70, 48, device=place), torch.zeros(96, 48, device=place)
        index, count = torch.zeros(70, dtype=torch.long, device=place), torch.zeros(1, device=place)
        triton.gather_gemm(x, weight, index, count)
        tiles = triton.tiles_of(torch.zeros(70, 6, dtype=torch.bool, device=place))
        triton.grouped_features(triton.grouped_columns(x, weight, tiles), weight, tiles)
    assert grids.seen[:3] == grids.seen[3:]


def test_triton_runs_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not in_triton("cpu")
    monkeypatch.setattr("calibration.devices.skipping.find_spec", lambda name: None)
    assert not in_triton("cuda:0")


@pytest.mark.parametrize("place", ["cpu", CPU])
@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("m", [1, 70])
def test_a_grouped_operator_is_the_masked_dense_one_and_says_how(place: str, role: str, m: int) -> None:
    if place is CPU:
        kernels(interpreted=True)
    op = Operator("grouped_gemm", "fp32", m=m, n=64, k=96, block=8, density=0.5, role=role)
    arena = Arena("cpu", 1e5, 1e8)
    launches = build(op, place, arena)
    groups = op.grouped // 8
    mask = group_masks(op)
    assert mask.shape == (m, groups)
    assert set(mask.sum(1).tolist()) == {groups // 2}
    assert len(mask.unique(dim=0)) <= PATTERNS
    x = _operand(op)
    weight, wide = arena.cut(64 * 96, "fp32", cold=True)[0](1), mask.repeat_interleave(8, 1)
    if role == "up":
        wanted = (x.double() @ weight.view(64, 96).double().t()) * wide
    else:
        wanted = (x.double() * wide) @ weight.view(96, 64).double()
    _close(launches.launch(1), wanted, 1e-4)
    assert ("Triton" in launches.how) == (place is CPU)


def _operand(op: Operator) -> Any:
    from calibration.devices.operators import random_tensor

    return random_tensor((op.m, op.k), op.dtype, "cpu", 1)


def test_a_gathered_operator_is_the_same_in_triton() -> None:
    kernels(interpreted=True)
    op = Operator("gather_gemm", "fp32", m=40, n=24, k=32, rows=13)
    first, second = (build(op, place, Arena("cpu", 1e5, 1e8)) for place in ("cpu", CPU))
    wanted = first.launch(1)
    assert int((wanted != 0).any(1).sum()) == 13
    for _ in range(3):  # written, not added up: it stays finite however often it is launched
        _close(second.launch(1), wanted.double(), 1e-5)
    assert "Triton" in second.how
    assert "scatter" in first.how


def test_loops_over_groups_that_nobody_uses() -> None:
    mask = torch.zeros(5, 3, dtype=torch.bool)
    assert not grouped_by_loops(torch.randn(5, 4), mask, 6, True)(torch.randn(6, 4)).any()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from calibration.devices import triton_kernels as kernels

number = {"index": "*i64", "order": "*i64", "users": "*i64", "count": "*i32", "used": "*i32", "chosen": "*i32"}
number |= dict.fromkeys(("x", "weight", "bias", "y"), "*bf16")
block = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "PRECISION": "ieee"}
for kernel, flags in (
    (kernels._gathered, {"BIASED": True, "ADD": True}),
    (kernels._columns, {"BIASED": False, "GATED": True}),
    (kernels._features, {}),
):
    constant = {**flags, **block}
    types = {name: "constexpr" if name in constant else number.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constant}
    for capability in (80, 90):
        made = triton.compile(ASTSource(kernel, types, constant, aligned), target=GPUTarget("cuda", capability, 32))
        assert "mma" in made.asm["ptx"], kernel
        print(kernel.__name__, capability)
"""


@pytest.mark.slow
def test_products_run_on_tensor_cores(triton: Any) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 6
