"""The CPU as a device, really run; and the torch operators, checked against plain arithmetic."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tables import tables_of

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional
from every_kind import every_kind  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from calibration.cli.calibrate import REQUESTS, in_format  # noqa: E402
from calibration.devices import (  # noqa: E402
    Operator,
    OutOfMemory,
    Unsupported,
    cpu,
    open_device,
)
from calibration.devices.cpu import CpuDevice, default_threads  # noqa: E402
from calibration.devices.operators import (  # noqa: E402
    HEAD_DIM,
    HIDDEN,
    Arena,
    EagerLayer,
    build,
    is_out_of_memory,
    random_tensor,
    rotary,
    rotary_tables,
)
from calibration.devices.protocol import (  # noqa: E402
    ELEMENTWISE_ROLES,
    LAYER_LAUNCHES,
    RECURRENT,
)
from calibration.devices.recurrent import BUILDERS, lacks, state_shape  # noqa: E402
from simulator.errors import InputError  # noqa: E402


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    # a small cache, so that rotation does not fill a gigabyte in every test
    with open_device("cpu", cache_bytes=4e6, memory_limit_bytes=1e9) as opened:
        yield opened


@pytest.fixture
def arena() -> Arena:
    return Arena("cpu", 1e6, 1e8)


def _close(value: Any, reference: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(value.float(), reference.float(), rtol=tolerance, atol=tolerance)


def test_arena_copies_are_distinct_and_exceed_the_cache_twice(arena: Arena) -> None:
    view, copies = arena.cut(10_000, "fp32", cold=True)
    starts = sorted(view(i).data_ptr() for i in range(copies))
    assert copies * 40_000 >= 2e6
    assert min(b - a for a, b in itertools.pairwise(starts)) >= 40_000
    assert all(start % 64 == starts[0] % 64 for start in starts)
    assert view(copies).data_ptr() == view(0).data_ptr()
    assert arena.cut(10_000, "fp32", cold=False)[1] == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 64, 32), (7, 33, 21), (128, 96, 256)])
def test_gemm(arena: Arena, dtype: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    launches = build(Operator("gemm", dtype, m=m, n=n, k=k), "cpu", arena)
    x = random_tensor((m, k), dtype, "cpu", 1).float()
    view, copies = arena.cut(n * k, dtype, cold=True)
    for i in (0, 1, copies - 1):
        _close(
            launches.launch(i),
            x @ view(i).view(n, k).float().t(),
            2e-2 * k**0.5 if dtype == "bf16" else 1e-4,
        )


def test_gemm_in_int8_is_exact(arena: Arena) -> None:
    launches = build(Operator("gemm", "int8", m=32, n=16, k=64), "cpu", arena)
    x, weight = (
        random_tensor((32, 64), "int8", "cpu", 1),
        arena.cut(16 * 64, "int8", cold=True)[0](0).view(16, 64),
    )
    assert torch.equal(launches.launch(0), x.int() @ weight.int().t())


def test_low_rank_pair(arena: Arena) -> None:
    launches = build(Operator("low_rank", "fp32", m=5, n=24, k=16, rank=8), "cpu", arena)
    flat = arena.cut(8 * 40, "fp32", cold=True)[0](2)
    first, second = flat[:128].view(8, 16), flat[128:].view(24, 8)
    _close(
        launches.launch(2), random_tensor((5, 16), "fp32", "cpu", 1) @ (second @ first).t(), 1e-3
    )


def test_gather_gemm_touches_only_its_rows(arena: Arena) -> None:
    launches = build(Operator("gather_gemm", "fp32", m=10, n=6, k=4, rows=3), "cpu", arena)
    x, weight = (
        random_tensor((10, 4), "fp32", "cpu", 1),
        arena.cut(24, "fp32", cold=True)[0](0).view(6, 4),
    )
    y, dense = launches.launch(0), x @ weight.t()
    computed = (y != 0).any(dim=1)
    assert int(computed.sum()) == 3
    _close(y[computed], dense[computed])


@pytest.mark.parametrize("role", ELEMENTWISE_ROLES[ELEMENTWISE_ROLES.index("qk_norm") :])
def test_elementwise(arena: Arena, role: str) -> None:
    launches = build(
        Operator("elementwise", "fp32", role=role, m=12, n=32, cold=False), "cpu", arena
    )
    x = arena.cut(12 * 32, "fp32", cold=False)[0](0).view(12, 32).clone()
    other = random_tensor((12, 32), "fp32", "cpu", 1)
    result = launches.launch(0)
    if role == "rotary":
        _close(result.reshape(12, 32).norm(dim=1), x.norm(dim=1))
    elif role == "select":
        assert result.shape == (12, 16)
        assert bool((result.diff(dim=1) > 0).all())
        left_out = x.scatter(1, result, -torch.inf)
        assert bool((x.gather(1, result).amin(1) >= left_out.amax(1)).all())
    elif role in ("embedding", "gather", "scatter", "cache_write"):
        _close(result.sort(dim=0).values, x.sort(dim=0).values)
    else:
        weight = random_tensor((32,), "fp32", "cpu", 2)
        norm = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * weight
        expected = {
            "qk_norm": norm,
            "activation": x * torch.sigmoid(x) * other,
            "residual": x + other,
        }
        _close(result, expected[role])
    # the input is as it was
    assert torch.equal(arena.cut(12 * 32, "fp32", cold=False)[0](0).view(12, 32), x)


def test_copy_moves_the_bytes(arena: Arena) -> None:
    launches = build(Operator("copy", n=100_000), "cpu", arena)
    view, copies = arena.cut(100_000, "int8", cold=True)
    launches.launch(1)
    assert torch.equal(view(1 + copies // 2), view(1))


@pytest.mark.parametrize(("fields", "message"), tables_of("devices/mistakes.yaml")["cpu"])
def test_refusals(device: CpuDevice, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        device.prepare(Operator(**fields))


def test_every_capability_can_be_prepared_and_sampled(device: CpuDevice) -> None:
    shape = {"batch": 1, "q_len": 32, "kv_len": 32, "heads": 4, "kv_heads": 2, "head_dim": 16}
    shape |= {"m": 4, "n": 32, "k": 32, "rank": 8, "rows": 2, "block": 16, "window": 4}
    for op in (op for dtype in device.dtypes() for op in every_kind(dtype, **shape)):
        if device.refuses(op):
            assert op.dtype == "int8" or op.kind in ("gemm_2to4", "launch_graph", *RECURRENT), (
                op.key
            )
            continue
        prepared = device.prepare(op)
        assert 0 < prepared.sample(3) < 1.0, op.key
        assert "perf_counter_ns" in prepared.method


@pytest.mark.skipif(bool(lacks()), reason="Transformers is not installed")
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrences_change_the_states_of_their_copy(kind: str, tokens: int) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "block": 16} if kind != "short_conv" else {}
    op = Operator(kind, "fp32", m=2 * tokens, n=8, batch=2, window=4, **sizes)
    states = [torch.zeros(state_shape(op)) for _ in range(2)]
    with torch.inference_mode():
        BUILDERS[kind](op, torch.float32, states)(1)
    assert not states[0].any()
    assert states[1].any()
    assert torch.isfinite(states[1]).all()


class MadeData(TorchDispatchMode):  # type: ignore[misc]
    """Counts operations whose result is no view of what they were given: on a GPU each is a
    launch."""

    made = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        given = [
            x for value in args for x in (value if isinstance(value, list | tuple) else [value])
        ]
        known = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        first = out[0] if isinstance(out, list | tuple) else out
        self.made += first.untyped_storage().data_ptr() not in known
        return out


@pytest.mark.parametrize(
    ("dtype", "launches"), [("bf16", LAYER_LAUNCHES), ("fp32", LAYER_LAUNCHES - 4)]
)
@pytest.mark.parametrize("kv_len", [2, 64])
def test_an_eager_layer_makes_as_many_launches_as_are_counted(
    dtype: str, launches: int, kv_len: int
) -> None:
    op = Operator("layer_eager", dtype, kv_len=kv_len, cold=False)
    layer = build(op, "cpu", Arena("cpu", 1e5, 1e8))
    with MadeData() as counted:
        layer.launch(0)
    assert counted.made == launches  # casts to and from fp32 launch nothing where all is fp32


def test_an_eager_layer_computes_what_a_decoder_layer_does() -> None:
    layer, kv_len = EagerLayer(9, dtype=torch.float32), 9
    hidden, position = torch.randn(1, 1, HIDDEN), torch.tensor([kv_len - 1])
    cos, sin = rotary_tables(position, HEAD_DIM, torch.float32)
    a = layer.self_attn
    x = F.rms_norm(hidden, (HIDDEN,), eps=1e-5)
    q, k, v = (
        (x @ p.weight.t()).view(1, -1, HEAD_DIM).transpose(0, 1)[None]
        for p in (a.q_proj, a.k_proj, a.v_proj)
    )
    keys = torch.cat((a.cache.keys, rotary(k, cos, sin)), dim=2)
    values = torch.cat((a.cache.values, v), dim=2)
    out = F.scaled_dot_product_attention(rotary(q, cos, sin), keys, values, enable_gqa=True)
    out = out.transpose(1, 2).reshape(1, 1, -1)
    expected = hidden + out @ a.o_proj.weight.t()
    x = F.rms_norm(expected, (HIDDEN,), eps=1e-5)
    gate, up = x @ layer.mlp.gate_proj.weight.t(), x @ layer.mlp.up_proj.weight.t()
    expected = expected + (F.silu(gate) * up) @ layer.mlp.down_proj.weight.t()
    _close(layer(hidden, (cos[None], sin[None])), expected, 1e-4)


def test_a_host_launches_from_one_thread(device: CpuDevice) -> None:
    layer, threads = (
        device.prepare(Operator("layer_eager", kv_len=16, cold=False)),
        torch.get_num_threads(),
    )
    assert layer.method.endswith("one thread")
    assert layer.sample(20) > 0
    assert torch.get_num_threads() == threads


def test_threads_are_those_of_the_environment_unless_they_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"1": 1, " 3 ": 3, "2,4": 2, "64": 8, "0": 8, "": 8, "many": 8, "-1": 8}
    for text, expected in values.items():
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert default_threads(8) == expected, text
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads(8) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    for threads, expected in ((None, 1), (usable, usable)):
        with CpuDevice(threads, cache_bytes=1e6, memory_limit_bytes=1e8) as opened:
            assert (opened.threads, opened.describe().stack["threads"]) == (expected, str(expected))
            assert f"({expected} threads)" in opened.describe().device


def test_threads_and_operands_beyond_the_machine_are_refused() -> None:
    for threads in (0, 10_000):
        with pytest.raises(InputError, match="threads: expected 1 to"):
            open_device("cpu", threads)
    with (
        CpuDevice(memory_limit_bytes=1e6, cache_bytes=1e5) as small,
        pytest.raises(OutOfMemory, match="bytes, limit"),
    ):
        small.prepare(Operator("gemm", "fp32", m=1, n=1000, k=1000))


def test_the_allocator_running_dry_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("flags", "capability", "limit", "lacks"),
    [
        ("avx512f avx512_bf16", "AVX512", "", False),
        ("avx512f avx512_bf16", "AVX512", "AVX512_CORE_AMX", False),
        ("avx512f avx512_bf16", "AVX512", "AVX512_CORE_VNNI", True),
        ("avx512f avx512_bf16", "AVX2", "", True),
        ("avx512f", "AVX512", "", True),
        ("avx2", "AVX2", "", True),
    ],
)
def test_a_cpu_without_bf16_instructions_is_named_and_takes_fp32(
    flags: str,
    capability: str,
    limit: str,
    lacks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    info = f"processor\t: {cpu._ALLOWED[0]}\nmodel name\t: Some CPU\nflags\t\t: {flags}\n"
    monkeypatch.setattr(cpu, "_read_text", lambda path: info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit or "ALL")
    for asked, dtype, advice in (
        (None, "fp32" if lacks else "bf16", "fp32 is used"),
        ("bf16", "bf16", "use --dtype fp32"),  # obeyed
        ("fp32", "fp32", ""),
    ):
        assert in_format(replace(REQUESTS, dtype=asked), "cpu").text("dtype") == dtype
        said = capsys.readouterr().err
        named = said.startswith(f"status: Some CPU ({capability}) has no bf16 instructions")
        assert named is (lacks and bool(advice))
        assert not lacks or advice in said
