"""Acceptance targets of the accuracy of predictions, next to the measured accuracy.

Use :func:`against_targets` with rows of :func:`calibration.validation.accuracy.run_protocol`: one criterion per target
whose table was evaluated. Numbers are percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.validation.accuracy import GEMMS
from calibration.validation.accuracy_tables import means, titles
from calibration.validation.protocol import Row
from calibration.validation.published import Comparison, compare_dense, compare_serving, compare_speedups, median_error
from calibration.validation.serving import held_out_models, median_of_logs
from calibration.validation.verdict import COVERAGE
from simulator.display import few

MAPES: Mapping[str, float] = {"a100": 5.0, "h100": 4.0}
"""Table -> target of the MAPE on held-out (n, k)."""
STACK_MAPES = {0: 8.0, 20: 0.0, 100: 5.5, 400: 4.8}
"""Rows of the held-out stack -> target of the MAPE, mean over stacks (0: none)."""
SERVING: Mapping[str, float] = {"vllm": 6.0, "sglang": 7.0, "trtllm": 7.0}
"""Engine -> target of the median error of times per output token."""


@dataclass(frozen=True)
class Criterion:
    """A target and the measured value; ``met`` is None where there is no target."""

    criterion: str
    target: str
    measured: str
    met: bool | None


def of_targets(criteria: Sequence[Criterion]) -> str:
    """Return how many targets are met, and the unmet ones.

    >>> of_targets([Criterion("bias", "5", "4", True), Criterion("coverage", "85-95", "97", False)])
    '1 of 2 accuracy targets is met; not met: coverage (97, target 85-95).'
    """
    known = [c for c in criteria if c.met is not None]
    unmet = [c for c in known if not c.met]
    if not known:
        return "None of these tables has a target."
    met = len(known) - len(unmet)
    text = f"{met} of {len(known)} accuracy targets {'is' if met == 1 else 'are'} met"
    return (
        f"{text}; not met: {few(f'{c.criterion} ({c.measured}, target {c.target})' for c in unmet)}."
        if unmet
        else f"{text}."
    )


def _at_most(criterion: str, measured: float, target: float) -> Criterion:
    """Return the criterion of an error (target 0: none)."""
    met = measured <= target if target else None
    return Criterion(criterion, f"<= {target:g}" if target else "-", f"{measured:.2f}", met)


def _coverage(criterion: str, shares: Sequence[float], high: float = COVERAGE[1]) -> Criterion:
    """Return the criterion of the lowest and highest of some coverages."""
    low, ends = COVERAGE[0], (min(shares), max(shares))
    measured = f"{ends[0]:.1f}" if len(shares) == 1 else f"{ends[0]:.1f} to {ends[1]:.1f}"
    target = f"{low:g} to {high:g}" if high < 100.0 else f">= {low:g}"
    return Criterion(criterion, target, measured, bool(low <= ends[0] and ends[1] <= high))


def against_targets(rows: Sequence[Row], published: bool = True) -> list[Criterion]:
    """Return the criteria of the tables among the rows and (``published``) of published measurements."""
    tables = {title: means(rows, title) for title in titles(rows)}
    criteria = [*_gemms(tables), *_stacks(tables), *_attention(tables), *_experts(tables)]
    return [*criteria, *(_published() if published else ())]


Tables = Mapping[str, Sequence[Row]]
"""Title -> rows, means over seeds."""


def _gemms(tables: Tables) -> Iterator[Criterion]:
    fits = [(name, r) for name in GEMMS for r in tables.get(name, ()) if r["method"] == "prunesim" and not r["rows"]]
    for name, scores in fits:
        if name.endswith("_wo"):
            yield _at_most(f"GEMM, {name}, m <= 16, unseen (n, k): MAPE", scores["mape m<=16"], 10.0)
            yield _coverage(f"GEMM, {name}, m <= 16, unseen (n, k): coverage", [scores["coverage m<=16"]])
            continue
        yield _at_most(f"GEMM, {name}, unseen (n, k): MAPE", scores["mape"], MAPES.get(name, 0.0))
        yield _coverage(f"GEMM, {name}, unseen (n, k): coverage", [scores["coverage"]])
        if name in ("a100", "a100_sglang") and "cold bias" in scores:
            yield _at_most(f"GEMM, {name}, cold, m <= 16: bias, either way", abs(scores["cold bias"]), 3.0)
            yield _coverage(f"GEMM, {name}, cold, m <= 16: coverage", [scores["cold coverage"]], high=100.0)


def _stacks(tables: Tables) -> Iterator[Criterion]:
    for title, rows in tables.items():
        for size, target in STACK_MAPES.items():
            method = "posterior" if size else "as shipped"
            scores = [r for r in rows if r["held_out"] and (r["method"], r["rows"]) == (method, size)]
            if not scores:
                continue
            name = f"{title}, {f'{size} rows' if size else 'as shipped'}"
            mape = float(np.mean([r["mape"] for r in scores]))
            yield _at_most(f"{name}: MAPE, mean of {len(scores)}", mape, target if title.startswith("gemm,") else 0.0)
            yield _coverage(f"{name}: coverage", [r["coverage"] for r in scores])
            if ratios := [r["ratio coverage"] for r in scores if "ratio coverage" in r]:
                yield _coverage(f"{name}: ratio coverage", ratios)


def _attention(tables: Tables) -> Iterator[Criterion]:
    mapes: dict[str, list[float]] = {}
    for title, rows in tables.items():
        for r in rows if title.startswith(("attention ", "mla ")) else ():
            mapes.setdefault(f"{title.split()[0]} {r['method']}", []).append(r["mape"])
    for name, values in mapes.items():
        criterion = f"{name} unseen: MAPE, worst of {len(values)} (mean {np.mean(values):.2f})"
        yield _at_most(criterion, max(values), 5.0)


def _experts(tables: Tables) -> Iterator[Criterion]:
    scores = [r for title, rows in tables.items() for r in rows if title.startswith("experts ") and not r["held_out"]]
    if scores:
        mapes = [r["mape"] for r in scores]
        criterion = f"experts, models unseen: MAPE, median of {len(scores)} (worst {max(mapes):.1f})"
        yield _at_most(criterion, float(np.median(mapes)), 8.0)
        for name in ("coverage", "ratio coverage"):
            mean = float(np.mean([r[name] for r in scores if name in r]))
            yield _coverage(f"experts, models unseen: {name}, mean", [mean])


def _percent_covered(rows: Sequence[Comparison]) -> float:
    return 100.0 * float(np.mean([r.inside for r in rows]))


def _published() -> Iterator[Criterion]:
    # targets: median error, highest coverage, median half-width
    kinds: Mapping[str, tuple[Callable[[], list[Comparison]], float, float, float]] = {
        "published dense times": (compare_dense, 8.0, 100.0, 0.0),
        "published speedups": (compare_speedups, 5.0, COVERAGE[1], 12.0),
    }
    for name, (compare, error, high, half_width) in kinds.items():
        rows = [r for r in compare() if r.split == "judge" and not r.own_code]
        above = float(np.median([r.upper / r.predicted - 1.0 for r in rows]))
        yield _at_most(f"{name} ({len(rows)}): median error", 100.0 * median_error(rows), error)
        yield _coverage(f"{name}: coverage", [_percent_covered(rows)], high=high)
        yield _at_most(f"{name}: half-width, median", 100.0 * above, half_width)
        for engine in sorted({r.engine for r in rows}) if compare is compare_dense else ():
            bias = [r.error for r in rows if r.engine == engine]
            yield _at_most(
                f"{name}, {engine} ({len(bias)}): bias, either way", 100.0 * abs(float(np.median(bias))), 6.0
            )
    held_out = held_out_models()
    for engine, target in SERVING.items():
        logs = np.concatenate([x.log_ratio for x in held_out if x.engine == engine and not x.experts])
        criterion = f"serving, {engine} ({len(logs)}), held-out dense model: time per token, median error"
        yield _at_most(criterion, 100.0 * median_of_logs(logs), target)
        yield _coverage(f"serving, {engine}: coverage", [_percent_covered(compare_serving(engine, experts=False))])
