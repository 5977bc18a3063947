"""What was asked of the accuracy of predictions, beside what the protocol and the published
measurements say.

Use :func:`against_bars` with rows of :func:`calibration.validation.accuracy.run_protocol`: a line for each bar whose
tables were judged. Numbers are percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.validation.accuracy import GEMMS, means, titles
from calibration.validation.protocol import Row
from calibration.validation.published import Comparison, compare_dense, compare_serving, compare_speedups, median_error
from calibration.validation.serving import leave_models_out

COVERED = (85.0, 95.0)
"""Range that the share of times and ratios inside 90 % intervals is to lie in."""
# fmt: off
MAPES: Mapping[str, float] = {"a100": 5.0, "h100": 4.0}
"""Table -> target of the MAPE on held-out (n, k)."""
LEFT_OUT = {0: 8.0, 20: 0.0, 100: 5.5, 400: 4.8}
"""Rows of the left-out stack -> bar of the mean MAPE over stacks (0: none)."""
# fmt: on


SERVED: Mapping[str, float] = {"vllm": 6.0, "sglang": 8.0, "trtllm": 8.0}
"""Engine -> bar of the median error of times per output token."""


@dataclass(frozen=True)
class Line:
    """A bar; ``met`` is None where nothing was asked."""

    what: str
    asked: str
    measured: str
    met: bool | None


def _most(what: str, measured: float, bar: float) -> Line:
    return Line(what, f"<= {bar:g}" if bar else "-", f"{measured:.2f}", measured <= bar if bar else None)


def _covered(what: str, shares: Sequence[float], low: float = COVERED[0], high: float = COVERED[1]) -> Line:
    """The lowest and highest of some shares inside their interval."""
    ends = min(shares), max(shares)
    text = f"{ends[0]:.1f}" if len(shares) == 1 else f"{ends[0]:.1f} to {ends[1]:.1f}"
    asked = f"{low:g} to {high:g}" if high < 100.0 else f">= {low:g}"
    return Line(what, asked, text, bool(low <= ends[0] and ends[1] <= high))


def against_bars(rows: Sequence[Row], published: bool = True) -> list[Line]:
    """Bars of the tables among the rows, and (``published``) of what papers measured, in the order of the design."""
    known = {title: means(rows, title) for title in titles(rows)}
    own = [*_in_table(known), *_stacks(known), *_attention(known), *_experts(known)]
    return [*own, *(_published() if published else ())]


Known = Mapping[str, Sequence[Row]]


def _in_table(known: Known) -> Iterator[Line]:
    for name, found in known.items():
        every = {r["method"]: r for r in found if not r["rows"]}
        if name not in GEMMS:
            continue
        smooth = every["prunesim"]
        if name.endswith("_wo"):
            yield _most(f"GEMM, {name}, m <= 16, unseen (n, k): MAPE", smooth["mape m<=16"], 10.0)
            yield _covered(f"GEMM, {name}, m <= 16, unseen (n, k): coverage", [smooth["coverage m<=16"]])
            continue
        yield _most(f"GEMM, {name}, unseen (n, k): MAPE", smooth["mape"], MAPES.get(name, 0.0))
        yield _covered(f"GEMM, {name}, unseen (n, k): coverage", [smooth["coverage"]])
        if name in ("a100", "a100_sglang") and "cold bias" in smooth:
            yield _most(f"GEMM, {name}, cold, m <= 16: bias, either way", abs(smooth["cold bias"]), 3.0)
            yield _covered(f"GEMM, {name}, cold, m <= 16: coverage", [smooth["cold coverage"]], high=100.0)


def _stacks(known: Known) -> Iterator[Line]:
    for title, rows in known.items():
        for size, bar in LEFT_OUT.items():
            method = "posterior" if size else "as shipped"
            found = [r for r in rows if r["left_out"] and (r["method"], r["rows"]) == (method, size)]
            if not found:
                continue
            what = f"{title}, {f'{size} rows' if size else 'as shipped'}"
            mape = float(np.mean([r["mape"] for r in found]))
            yield _most(f"{what}: MAPE, mean of {len(found)}", mape, bar if title.startswith("gemm") else 0.0)
            yield _covered(f"{what}: times inside", [r["coverage"] for r in found])
            if ratios := [r["ratio coverage"] for r in found if "ratio coverage" in r]:
                yield _covered(f"{what}: ratios inside", ratios)


def _attention(known: Known) -> Iterator[Line]:
    found: dict[str, list[float]] = {}
    for title, rows in known.items():
        for r in rows if title.startswith(("attention ", "mla ")) else ():
            found.setdefault(f"{title.split()[0]} {r['method']}", []).append(r["mape"])
    for what, errors in found.items():
        what = f"{what} unseen: MAPE, worst of {len(errors)} (mean {np.mean(errors):.2f})"
        yield _most(what, max(errors), 5.0)


def _experts(known: Known) -> Iterator[Line]:
    found = [r for title, rows in known.items() for r in rows if title.startswith("experts ") and not r["left_out"]]
    if found:
        errors = [r["mape"] for r in found]
        what = f"experts, models unseen: MAPE, median of {len(found)} (worst {max(errors):.1f})"
        yield _most(what, float(np.median(errors)), 8.0)
        for score, name in (("coverage", "times"), ("ratio coverage", "ratios")):
            mean = float(np.mean([r[score] for r in found if score in r]))
            yield _covered(f"experts, models unseen: {name} inside, mean", [mean])


def _published() -> Iterator[Line]:
    def half(rows: Sequence[Comparison]) -> float:
        return float(np.median([r.upper / r.predicted - 1.0 for r in rows]))

    kinds: Mapping[str, tuple[Callable[[], list[Comparison]], float, float, float]] = {
        "published dense times": (compare_dense, 8.0, 100.0, 0.0),
        "published speedups": (compare_speedups, 5.0, COVERED[1], 12.0),
    }
    for name, (compare, error, high, width) in kinds.items():
        rows = [r for r in compare() if r.split == "judge" and not r.own_code]
        yield _most(f"{name} ({len(rows)}): median error", 100.0 * median_error(rows), error)
        yield _covered(f"{name}: inside", [100.0 * float(np.mean([r.inside for r in rows]))], high=high)
        yield _most(f"{name}: half-width, median", 100.0 * half(rows), width)
        for engine in sorted({r.engine for r in rows}) if compare is compare_dense else ():
            bias = [r.error for r in rows if r.engine == engine]
            yield _most(f"{name}, {engine} ({len(bias)}): bias, either way", 100.0 * abs(float(np.median(bias))), 6.0)
    left_out = leave_models_out()
    for engine, bar in SERVED.items():
        logs = np.concatenate([x.logs for x in left_out if x.engine == engine])
        what = f"serving, {engine} ({len(logs)}), one model left out: time per token, median error"
        yield _most(what, 100.0 * float(np.median(np.abs(np.expm1(logs)))), bar)
        inside = [r.inside for r in compare_serving(engine)]
        yield _covered(f"serving, {engine}: inside", [100.0 * float(np.mean(inside))])
