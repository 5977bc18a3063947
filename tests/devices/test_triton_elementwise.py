"""Elementwise operators as one Triton kernel each: equal to the composites of torch, and recorded as what they are."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from pretended_cuda import CPU, PLACE, kernels  # noqa: E402

from calibration.devices import Operator, operators  # noqa: E402
from calibration.devices.operators import Arena, Launches, build  # noqa: E402
from calibration.devices.protocol import NORMS  # noqa: E402
from calibration.devices.skipping import fused_elementwise, in_triton, triton_needs  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KERNELS = {**dict.fromkeys(NORMS, 6), "activation": 2, "rotary": 4}
"""Kernels of torch's composites in fp32; norms of 16-bit formats have 2 more, which convert."""


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    kernels()
    return fused_elementwise()  # type: ignore[no-any-return]


def _random(*shape: int, dtype: Any, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(PLACE, dtype)


def _close(value: Any, reference: Any, dtype: Any) -> None:
    assert value.dtype == dtype
    torch.testing.assert_close(value.float(), reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "n"), [(1, 4096), (9, 100), (33, 64), (3, 1500)])
def test_a_norm(fused: Any, dtype: Any, rows: int, n: int) -> None:
    x, weight = 3.0 * _random(rows, n, dtype=dtype), _random(n, dtype=dtype, seed=1)
    reference = operators.rms_norm(x.float(), weight.float(), 0.5)
    _close(fused.rms_norm(x, weight, 0.5), reference, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 9, 64), (5, 17, 128), (3, 2, 24), (2, 3, 2)])
def test_a_rotary_embedding(fused: Any, dtype: Any, tokens: int, heads: int, width: int) -> None:
    x = _random(tokens, heads, width, dtype=dtype)
    cos, sin = (t.to(PLACE) for t in operators.rotary_tables(torch.arange(tokens) + 3, width, dtype))
    reference = operators.rotary(x.float(), cos.float()[:, None], sin.float()[:, None])
    _close(fused.rotary(x, cos, sin), reference, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1024), (5, 333)])
def test_a_gated_activation(fused: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    gate, up = (4.0 * _random(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    _close(fused.gated(gate, up), operators.gated(gate.float(), up.float()), dtype)


def _built(role: str, place: str, m: int = 5, n: int = 96) -> Launches:
    return build(Operator("elementwise", "fp32", m=m, n=n, role=role), place, Arena("cpu", 1e5, 1e8))


@pytest.mark.parametrize("role", KERNELS)
def test_an_operator_is_one_kernel_on_a_gpu_with_triton(role: str) -> None:
    kernels(interpreted=True)
    one, composite = _built(role, CPU), _built(role, "cpu")
    assert (one.how, composite.how) == (", one kernel (Triton)", "")
    for i in range(2):
        torch.testing.assert_close(one.launch(i), composite.launch(i), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("role", KERNELS)
def test_a_composite_on_a_gpu_states_its_kernels(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.devices.skipping.find_spec", lambda name: None)
    assert _built(role, CPU).how == f", {KERNELS[role]} kernels (torch)"
    assert _built("residual", CPU).how == ""


@pytest.mark.quick
def test_triton_needs_a_c_compiler_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels()
    for name in ("TRITON_INTERPRET", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("calibration.devices.skipping.which", lambda name: None)
    assert triton_needs() == "a C compiler (gcc or clang, or CC) for Triton's launcher"
    assert not in_triton("cuda:0")
    monkeypatch.setenv("CC", "cc")
    assert in_triton("cuda:0")
    monkeypatch.delenv("CC")
    monkeypatch.setattr("calibration.devices.skipping.which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert in_triton("cuda:0")
    monkeypatch.setattr("calibration.devices.skipping.find_spec", lambda name: None)
    assert triton_needs() == "Triton (extra kernels)"
