"""Every moved prediction shows in the diff of ``golden/predictions.txt``.

The file holds whole models and single operators, one prediction per line, rounded to six
significant digits. If a change is meant to move predictions, ``PRUNESIM_GOLDEN=write python -m
pytest tests/test_golden.py`` rewrites the moved lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from operator_times import (
    collective_time,
    decode_time,
    delta_net_time,
    elementwise_time,
    experts_time,
    prefill_time,
)

import simulator
from simulator.codes import Kernel
from simulator.operators.collective import COLLECTIVES

pytestmark = pytest.mark.quick

GOLDEN = Path(__file__).parent / "golden" / "predictions.txt"
DIGITS = 6
NOISE = 1e-6
"""Relative differences between processors: numpy's functions of float32, in which tiles of GEMMs are
compared, round differently with and without AVX-512. The largest difference found is 2.8e-7."""
LINES_SHOWN = 40
"""Moved lines that a failure shows; it counts all of them."""

MODELS = (
    "llama-3.1-8b",
    "deepseek-v2-lite",  # latent attention and experts
    "qwen2.5-0.5b",
    "mixtral-8x7b",  # few large experts
    "gemma-2-9b",  # windows
    "qwen3-30b-a3b",  # many small experts
    "opt-13b",  # no gate in the MLP
    "nemotron-super-49b",  # layers that differ
    "qwen3-next-80b-a3b",  # gated delta nets
)
DTYPES = {  # GPUs: calibrated on several stacks, on one, and known from a datasheet only; and a CPU
    "h100_sxm": "bf16",
    "a100_sxm_80gb": "bf16",
    "rtx_4090": "bf16",
    "b200_sxm": "fp8",
    "cpu": "fp32",
    "h20": "bf16",
    "l40s": "bf16",
    "mi300x": "bf16",
    "t4": "fp16",
}
ENGINES = ("vllm", "hf", "trtllm", "sglang", "compile", "reference")
REQUESTS = (("prefill", 1, 2048), ("decode", 8, 4096), ("generate", 4, 512), ("serve", 32, 1024))
SPARSITIES = (0.25, 0.5)
PROFILES = ("h100_sxm", "a100_sxm_80gb@trtllm", "b200_sxm@sglang", "rtx_4090", "h20", "mi300x")
"""Profiles whose single operators are timed."""


class Line(NamedTuple):
    """One prediction: what is predicted, the values, the bottleneck."""

    case: str
    values: tuple[float, ...]
    bottleneck: str


def record_lines(cells: tuple[object, ...], **table: Any) -> Iterator[Line]:
    """Lines of the records of a table, each with the cells that identify the request."""
    for record in simulator.table(**table):
        r = record.to_dict()
        names = ("dense_s", "pruned_s", "speedup", "speedup_lower", "speedup_upper")
        case = (*cells, r["method"] or r["family"], f"{r['sparsity']:g}")
        yield Line(" ".join(map(str, case)), tuple(r[name] for name in names), r["bottleneck"])


def families() -> Iterator[Line]:
    """All families, on two GPUs per model and phase; GPUs, engines and sparsities take turns."""
    for turn, (model, (phase, batch, seq), _) in enumerate(product(MODELS, REQUESTS, range(2))):
        gpu, engine = tuple(DTYPES)[turn % 9], ENGINES[(turn + turn // 9) % 6]
        sparsity = SPARSITIES[turn % 2]
        named = sorted({sparsity, 0.5})  # 2:4 has no sparsity but 0.5
        request = {"phase": [phase], "batch": [batch], "seq": [seq], "engine": [engine]}
        cells = (model, gpu, engine, phase, batch, seq, DTYPES[gpu])
        for line in record_lines(
            cells, models=[model], hardware=[gpu], sparsity=named, dtype=DTYPES[gpu], **request
        ):
            family, removed = line.case.split()[-2:]
            if float(removed) == sparsity or family == "semi_structured":
                yield line


def settings() -> Iterator[Line]:
    """Number formats, several GPUs, skewed experts and published methods."""
    for phase, batch, seq in REQUESTS:
        request = {"phase": [phase], "batch": [batch], "seq": [seq], "engine": ["vllm"]}
        for gpu, model, name, settings in (
            ("h100_sxm", "llama-3.1-8b", "fp8", {"dtype": "fp8"}),
            ("a100_sxm_80gb", "llama-3.1-8b", "int4", {"weight_dtype": "int4"}),
            ("h100_sxm", "llama-3.1-8b", "kv-fp8", {"kv_dtype": "fp8"}),
            ("h100_sxm", "llama-3.1-70b", "tensor-4", {"devices": 4}),
            ("l40s", "llama-3.1-70b", "tensor-4", {"devices": 4}),
            (
                "h200_sxm",
                "mixtral-8x7b",
                "expert-8",
                {"devices": 8, "parallel": "expert", "skew": 0.8},
            ),
        ):
            cells = (model, gpu, "vllm", phase, batch, seq, name)
            asked = {
                "models": [model],
                "hardware": [gpu],
                "family": ["width", "depth"],
                "sparsity": [0.25],
            }
            yield from record_lines(cells, **settings, **asked, **request)
        if phase in ("prefill", "decode"):
            for model, gpu, routed in (
                ("llama-2-7b", "a100_sxm_80gb", False),
                ("mixtral-8x7b", "h200_sxm", True),
            ):
                methods = [
                    name
                    for name, method in simulator.METHODS.items()
                    if (method.family == "experts") == routed
                ]
                asked = {"models": [model], "hardware": [gpu], "method": methods}
                yield from record_lines(
                    (model, gpu, "vllm", phase, batch, seq, "bf16"), **asked, **request
                )


def operators() -> Iterator[Line]:
    """Single operators: a few shapes of each kind on each profile."""
    moved = 10.0 ** np.arange(3, 10)
    m, n, k = np.transpose(
        [(1, 4096, 4096), (17, 1024, 14336), (300, 28672, 4096), (8192, 4096, 4096), (64, 1000, 72)]
    )
    batch, tokens = np.transpose(
        [(1, 100), (64, 100), (1, 2048), (16, 2048), (1, 32768), (64, 8192)]
    )
    one = np.ones_like(m)
    for profile in PROFILES:
        hw = simulator.load_hardware(profile)
        gemms: dict[str, dict[str, Any]] = {
            f"gemm:{kernel.name.lower()}": {"kernel": kernel}
            for kernel in Kernel
            if kernel is not Kernel.SPMV
        }
        gemms |= {
            f"gemm:{weights}-weights": {"weight_dtype": weights} for weights in ("int4", "fp8")
        }
        for name, options in gemms.items():
            yield from times(profile, name, simulator.gemm_time(m, n, k, hw, **options), m, n, k)
        vector = simulator.gemm_time(
            one, n, k, hw, kernel=Kernel.SPMV, options=simulator.GemmOptions(density=0.5)
        )
        yield from times(profile, "gemm:spmv", vector, one, n, k)
        for name, t in (
            ("prefill", prefill_time(batch, tokens, tokens, 32, 8, 128, hw)),
            ("prefill:window", prefill_time(batch, tokens, tokens, 32, 8, 128, hw, window=1024)),
            ("prefill:latent", prefill_time(batch, tokens, tokens, 16, 16, 192, hw, value_dim=128)),
            ("decode", decode_time(batch, tokens, 32, 8, 128, hw)),
            ("decode:fp8", decode_time(batch, tokens, 32, 8, 128, hw, kv_dtype="fp8")),
            (
                "decode:latent",
                decode_time(batch, tokens, 16, 1, 576, hw, value_dim=512, latent=True),
            ),
            ("delta_net:step", delta_net_time(batch, batch, 32, 16, 128, 128, hw)),
            ("delta_net:prompt", delta_net_time(batch * tokens, batch, 32, 16, 128, 128, hw)),
        ):
            yield from times(profile, name, t, batch, tokens)
        for skew in (0.0, 0.5):
            yield from times(
                profile, f"experts:{skew:g}", experts_time(m, n, k, 64, 6, hw, skew=skew), m, n, k
            )
        for role in ("attention_norm", "activation", "rotary", "embedding", "gather"):
            yield from times(
                profile, f"elementwise:{role}", elementwise_time(moved, moved, hw, role=role), moved
            )
        for kind in COLLECTIVES if hw.link else ():
            yield from times(profile, kind, collective_time(moved, 4, hw, kind=kind), moved)


def times(profile: str, name: str, t: Any, *sizes: Any) -> Iterator[Line]:
    """Lines of the times of one operator, its sizes after its name."""
    for *size, seconds, lower, upper, limit in zip(
        *sizes, t.seconds, t.lower, t.upper, t.bottlenecks, strict=True
    ):
        case = (profile, name, *(f"{x:.0f}" for x in size))
        yield Line(" ".join(case), tuple(map(float, (seconds, lower, upper))), str(limit))


def text_of(line: Line) -> str:
    """A line of the file."""
    values = "".join(f"{value:>{DIGITS + 7}.{DIGITS}g}" for value in line.values)
    return f"{line.case:<76}{values}  {line.bottleneck}"


def line_of(text: str) -> Line:
    """The prediction that a line of the file holds."""
    case, *values, bottleneck = re.split(" {2,}", text)
    return Line(case, tuple(map(float, values)), bottleneck)


def unmoved(old: Line, new: Line) -> bool:
    """Whether a prediction rounds to the line of the file, but for the noise between processors."""
    if len(old.values) != len(new.values) or old.bottleneck != new.bottleneck:
        return False
    before, after = np.array(old.values), np.array(new.values)
    rounding = 0.5 * 10.0 ** (np.floor(np.log10(before)) - DIGITS + 1)
    return bool(np.all(np.abs(after - before) <= rounding + NOISE * before))


def moves(old: Mapping[str, Line], new: Mapping[str, Line]) -> list[str]:
    """Return a line per difference: old values, new values, the largest relative change."""
    found = [f"- {text_of(line)}" for case, line in old.items() if case not in new]
    for case, line in new.items():
        before = old.get(case)
        if before is None:
            found.append(f"+ {text_of(line)}")
        elif not unmoved(before, line):
            change = max((b / a - 1.0 for a, b in zip(before.values, line.values)), key=abs)
            found.append(f"  {text_of(before)}\n> {text_of(line)}  ({100 * change:+.3g} %)")
    return found


def test_no_prediction_moves() -> None:
    new = {line.case: line for part in (families, settings, operators) for line in part()}
    old = (
        {line.case: line for line in map(line_of, GOLDEN.read_text("utf-8").splitlines())}
        if GOLDEN.exists()
        else {}
    )
    found = moves(old, new)
    if os.environ.get("PRUNESIM_GOLDEN") == "write":
        kept = (
            old[case] if case in old and unmoved(old[case], line) else line
            for case, line in new.items()
        )
        GOLDEN.write_text("".join(f"{text_of(line)}\n" for line in kept), encoding="utf-8")
        return
    more = [f"... and {len(found) - LINES_SHOWN} more"] if len(found) > LINES_SHOWN else []
    assert not found, "\n".join(
        [f"{len(found)} of {len(new)} predictions moved:", *found[:LINES_SHOWN], *more]
    )


def test_a_moved_prediction_shows_old_and_new_and_by_how_much() -> None:
    one, two, gone = (
        Line("a", (1.23456, 2.0), "memory"),
        Line("b", (1e-6, 1.0), "host"),
        Line("c", (1.0, 1.0), "l2"),
    )
    old = {line.case: line_of(text_of(line)) for line in (one, two, gone)}
    assert moves(old, {"a": Line("a", (1.234564, 2.000004), "memory"), "b": two, "c": gone}) == []
    found = moves(
        old,
        {
            "a": Line("a", (1.23456, 2.2), "memory"),
            "b": Line("b", (1e-6, 1.0), "launch"),
            "d": gone._replace(case="d"),
        },
    )
    shown = [" ".join(line.split()) for line in found]
    assert shown == [
        "- c 1 1 l2",
        "a 1.23456 2 memory > a 1.23456 2.2 memory (+10 %)",
        "b 1e-06 1 host > b 1e-06 1 launch (+0 %)",
        "+ d 1 1 l2",
    ]
