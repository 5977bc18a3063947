"""Judge published speedups as claims: as they are, and with a condition changed.

A changed claim states the measured speedup with another phase, batch, GPU or engine than the
measurement had, or moves it by the predicted effect of cached prompts. Half of the sources chooses
the probability below which a claim is unlikely; the others evaluate it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from calibration.evidence.measurements import published
from calibration.evidence.published import pruning_text
from calibration.validation.scoring import table
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.prediction.claims import (
    COLUMNS,
    EAGER,
    GRAPHS,
    PHASES,
    UNLIKELY,
    Claim,
    Judgement,
    judge,
)

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2)
NOTABLE = 0.1  # relative change of the prediction from which a changed claim should be detected
OTHER_GPUS = ("h100_sxm", "l4", "rtx_4090")
OTHER_BATCHES = (1, 32)

AS_PUBLISHED, CUSTOM = "as published", "custom modelling code"
CHANGES: Mapping[str, str] = {
    AS_PUBLISHED: AS_PUBLISHED,
    CUSTOM: "as published, custom modelling code",
    "phase": "other phase",
    "batch": "other batch",
    "gpu": "other GPU",
    "graphs": "engine with or without CUDA graphs",
    "prefix": "cached prompts",
}


@dataclass(frozen=True)
class Judged:
    """A judged claim: whether its source chooses the threshold, what was changed, and by how much
    the change moves the prediction."""

    chooses: bool
    change: str  # a key of CHANGES
    judgement: Judgement
    moved: float = math.inf

    @property
    def place(self) -> int:
        """Place of the true condition among the likeliest of each kind, from 0."""
        true = {CUSTOM: ("code",), "graphs": ("graphs", "host")}.get(self.change, (self.change,))
        kinds = [cause.kind for cause in self.judgement.each_kind]
        return next((i for i, kind in enumerate(kinds) if kind in true), len(kinds))


def claim_of(row: Mapping[str, str]) -> Claim:
    before, after = float(row["dense"]), float(row["pruned"])
    speedup = after / before if row["unit"].startswith("tokens") else before / after
    cells = {name: text for name, text in row.items() if name in COLUMNS}
    own = {"pruning": pruning_text(row), "speedup": str(speedup), "dtype": "bf16"}
    return Claim.read({**cells, **own})


def changed(claim: Claim) -> Iterator[tuple[str, Claim]]:
    """Yield claims that state another condition than the measurement had."""
    request = claim.request
    other = EAGER if load_engine(request.engine).graph else GRAPHS
    requests = [
        *(("phase", replace(request, phase=phase)) for phase in PHASES if phase != request.phase),
        *(("batch", replace(request, batch=b)) for b in OTHER_BATCHES if b != request.batch),
        ("graphs", replace(request, engine=other)),
    ]
    yield from ((change, replace(claim, request=one)) for change, one in requests)
    for hw in map(load_hardware, OTHER_GPUS):
        if hw.label != claim.hardware.label:
            yield "gpu", replace(claim, hardware=hw)


@lru_cache(maxsize=1)
def judged_claims() -> tuple[Judged, ...]:
    rows = [r for r in published("speedups") if not r["left_out"] and r["scope"] == "model"]
    # a publication may have several tables
    sources = sorted({row["source"].split()[0] for row in rows})
    return tuple(
        one for row in rows for one in _judged(row, sources.index(row["source"].split()[0]) % 2 > 0)
    )


def _judged(row: Mapping[str, str], chooses: bool) -> Iterator[Judged]:
    claim = claim_of(row)
    stated = judge(claim)
    custom = row["own_code"] == "true"
    yield Judged(chooses, CUSTOM if custom else AS_PUBLISHED, stated)
    for change, other in changed(claim) if not custom else ():
        try:
            found = judge(other)
        except InputError:  # the engine or the GPU cannot run it
            continue
        moved = math.log(found.result.speedup / stated.result.speedup)
        yield Judged(chooses, change, found, abs(moved))
    for cause in stated.causes if not custom else ():
        if cause.kind == "prefix":
            effect = cause.speedup / stated.result.speedup
            found = judge(replace(claim, speedup=claim.speedup * effect))
            yield Judged(chooses, "prefix", found, abs(math.log(effect)))


def _share(some: Sequence[Judged], threshold: float = UNLIKELY) -> str:
    found = sum(j.judgement.probability < threshold for j in some)
    return f"{found} of {len(some)}" if some else ""


def claim_tables() -> list[str]:
    """Return the tables of ``docs/generated/claims.md``: false alarms and detections by threshold
    on the sources that choose it, and by change on all sources."""
    every = judged_claims()
    notable = [j for j in every if j.moved >= NOTABLE]
    changes = tuple(CHANGES)[2:]
    rows = [*(((change,), title) for change, title in CHANGES.items()), (changes, "all changes")]

    def some(chooses: bool, kinds: Sequence[str]) -> list[Judged]:
        return [j for j in notable if j.chooses == chooses and j.change in kinds]

    chosen = [
        [f"{100 * t:g} %", *(_share(some(True, kinds), t) for kinds in ((AS_PUBLISHED,), changes))]
        for t in THRESHOLDS
    ]
    cells = []
    for kinds, title in rows:
        both = [some(False, kinds), some(True, kinds)]
        found = [j for part in both for j in part if j.judgement.unlikely]
        right = [f"{sum(j.place < most for j in found)} of {len(found)}" for most in (1, 3)]
        total = sum(j.change in kinds for j in every)
        broken = sum(j.judgement.breaks_bound for part in both for j in part)
        right = ["", ""] if kinds == (AS_PUBLISHED,) else right
        cells.append([title, f"{total}", *map(_share, both), *right, f"{broken}"])
    header = ["claims", "all", "unlikely (evaluation)", "unlikely (choice)", "right cause first"]
    return [
        table(["unlikely below", "false alarms", "detected changes"], chosen),
        table([*header, "right cause in the first three", "break the bound"], cells),
    ]
