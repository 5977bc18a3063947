"""GEMMs that skip and fused operators, in Triton: equal to composites of torch, and recorded as
what they are."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional

from fakes.interpreted import CPU, PLACE, kernels  # noqa: E402

from calibration.devices import Operator, operators  # noqa: E402
from calibration.devices.operators import (  # noqa: E402
    PATTERNS,
    Arena,
    Launches,
    build,
    group_masks,
    in_triton,
    random_tensor,
    triton_needs,
)
from calibration.devices.protocol import NORMS  # noqa: E402

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
def test_a_gathered_gemm_computes_the_rows_that_a_count_on_the_device_says(
    triton: Any, dtype: Any, count: int
) -> None:
    x, weight, bias = (
        _random(*shape, dtype=dtype, seed=i)
        for i, shape in enumerate(((37, 100), (150, 100), (150,)))
    )
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
    "random": lambda tokens, groups: (
        torch.rand(tokens, groups, generator=torch.Generator().manual_seed(2)) < 0.4
    ),
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
    x, weight, bias = (
        _random(*s, dtype=dtype, seed=i) for i, s in enumerate(((tokens, k), (n, k), (n,)))
    )
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
    # sorted by mask, one tile of two never meets group 3
    assert sorted(tiles.used.tolist()) == [1, 2]
    poisoned = _random(groups * width, 20).view(groups, width, 20)
    poisoned[[0, 2]] = torch.nan
    weight = poisoned.flatten(0, 1)
    y = triton.grouped_columns(_random(tokens, 20), weight, tiles)
    assert torch.isfinite(y).all()
    assert torch.isfinite(triton.grouped_features(y, weight, tiles)).all()


@pytest.mark.parametrize("place", ["cpu", CPU])
@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("m", [1, 70])
def test_a_grouped_operator_is_the_masked_dense_one_and_says_how(
    place: str, role: str, m: int
) -> None:
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
    x = random_tensor((op.m, op.k), op.dtype, "cpu", 1)
    weight, wide = arena.cut(64 * 96, "fp32", cold=True)[0](1), mask.repeat_interleave(8, 1)
    if role == "up":
        wanted = (x.double() @ weight.view(64, 96).double().t()) * wide
    else:
        wanted = (x.double() * wide) @ weight.view(96, 64).double()
    _close(launches.launch(1), wanted, 1e-4)
    assert ("Triton" in launches.how) == (place is CPU)


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


# -- elementwise operators


def _equal(value: Any, reference: Any, dtype: Any) -> None:
    """Compare element by element, with the rounding of the format."""
    assert value.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(value.float(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "n"), [(1, 4096), (9, 100), (33, 64), (3, 1500)])
def test_a_norm(triton: Any, dtype: Any, rows: int, n: int) -> None:
    x, weight = 3.0 * _random(rows, n, dtype=dtype), _random(n, dtype=dtype, seed=1)
    reference = operators.rms_norm(x.float(), weight.float(), 0.5)
    _equal(triton.rms_norm(x, weight, 0.5), reference, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "heads", "width"), [(1, 9, 64), (5, 17, 128), (3, 2, 24), (2, 3, 2)]
)
def test_a_rotary_embedding(triton: Any, dtype: Any, tokens: int, heads: int, width: int) -> None:
    x = _random(tokens, heads, width, dtype=dtype)
    cos, sin = (
        t.to(PLACE) for t in operators.rotary_tables(torch.arange(tokens) + 3, width, dtype)
    )
    reference = operators.rotary(x.float(), cos.float()[:, None], sin.float()[:, None])
    _equal(triton.rotary(x, cos, sin), reference, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1024), (5, 333)])
def test_a_gated_activation(triton: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    gate, up = (4.0 * _random(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    _equal(triton.gated(gate, up), operators.gated(gate.float(), up.float()), dtype)


def _built(role: str, place: str, m: int = 5, n: int = 96) -> Launches:
    return build(
        Operator("elementwise", "fp32", m=m, n=n, role=role), place, Arena("cpu", 1e5, 1e8)
    )


@pytest.mark.parametrize("role", [*NORMS, "activation", "rotary"])
def test_an_operator_is_one_kernel_on_a_gpu_with_triton(role: str) -> None:
    kernels(interpreted=True)
    one, composite = _built(role, CPU), _built(role, "cpu")
    assert (one.how, composite.how) == (", one kernel (Triton)", "")
    for i in range(2):
        torch.testing.assert_close(one.launch(i), composite.launch(i), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_triton_needs_a_c_compiler_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels()
    for name in ("TRITON_INTERPRET", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("calibration.devices.operators.which", lambda name: None)
    assert triton_needs() == "a C compiler (gcc or clang, or CC) for Triton's launcher"
    assert not in_triton("cuda:0")
    monkeypatch.setenv("CC", "cc")
    assert in_triton("cuda:0")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(
        "calibration.devices.operators.which",
        lambda name: "/usr/bin/gcc" if name == "gcc" else None,
    )
    assert in_triton("cuda:0")
    monkeypatch.setattr("calibration.devices.operators.find_spec", lambda name: None)
    assert triton_needs() == "Triton (extra kernels)"
