"""Judge a claimed speedup: how probable it is, whether it breaks its bound, and which other
conditions would give it.

The log of a speedup is normally distributed on each side of its prediction, with the standard
deviation that the end of the interval on that side states. The probability of a claim is the share
of outcomes that are at least as many standard deviations away, on both sides.

Other conditions (:class:`Cause`) are predicted in the same way. The likeliest has the largest
density at the claim times its prior: every kind of condition is equally probable, and so is every
condition of one kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import NormalDist
from typing import Any

from simulator.arguments import Range, number
from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.files.csv import read_csv
from simulator.files.read import read_bounded
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.model import Model
from simulator.prediction.compare import request_results
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import by_key, requests_of, setting
from simulator.prediction.result import HasResult, Result, Results
from simulator.prediction.wording import (
    HasSpeedup,
    probability_text,
    speedup_text,
)
from simulator.request import SETTINGS, Request, known
from simulator.units import parse_ratio, ratio

RATIO = Range(0.001, 10_000.0, "a ratio from 0.001 to 10,000")

UNLIKELY = 0.1
"""Probability below which a claim is unlikely. It was chosen on published speedups of three sources
and evaluated on those of four others (docs/generated/claims.md)."""

EXPLAINS = 0.01
"""Probability of a claim under a condition from which the condition explains it (assumed)."""

SMALLEST_LOG_SD = 0.01
"""Least log standard deviation of a measured speedup: REPEATED_LOG_SD of the intervals."""

GPUS = (
    *("a100_sxm_80gb", "h100_sxm", "h200_sxm", "b200_sxm", "mi300x", "l40s", "l4", "a6000"),
    *("rtx_3090", "rtx_4090", "rtx_pro_6000"),
)
"""GPUs that may have been measured instead: common ones of each generation."""

BATCHES = (1, 8, 32, 128)
PHASES = ("prefill", "decode")
"""Batches and phases that may have been measured instead."""

EAGER, GRAPHS = "hf", "compile"
"""An engine that launches every kernel from the host, and one that replays CUDA graphs."""

SLOW_HOST = 3.0
"""Measured over predicted time of a dense model that a slow host launches (assumed)."""

CACHE_BLOCK = 16
"""Tokens of a block of the prefix cache (simulator/engines/vllm.yaml, queue). Of a repeated prompt,
the last block is computed."""

REQUIRED = ("model", "hardware", "engine", "pruning", "phase", "batch", "speedup")
COLUMNS = (
    *REQUIRED,
    *("seq", "new_tokens", "cached_prefix", "dtype", "weight_dtype", "kv_dtype", "devices"),
)
"""Columns of a file of claims: those that it must have, and all that it may have."""


@dataclass(frozen=True)
class Claim:
    """A stated speedup of one pruning in one request on one device."""

    speedup: float
    request: Request
    pruning: Pruning
    hardware: HardwareProfile

    def __post_init__(self) -> None:
        number("claimed speedup", self.speedup, RATIO)

    @classmethod
    def of(cls, speedup: float, found: Results, hardware: Sequence[HardwareProfile]) -> Claim:
        """Return the claim about the only result of a table."""
        if len(found) > 1 or len(found.requests) > 1:
            many = max(len(found), len(found.requests))
            raise InputError(
                f"--claim: expected one pruning, device, engine and request, got {many} predictions"
            )
        (hw,) = (hw for hw in hardware if hw.label == found[0].hardware)
        return cls(speedup, found.requests[0], found.prunings[found.pruning[0]], hw)

    @classmethod
    def read(cls, cells: Mapping[str, str]) -> Claim:
        """Return the claim of a row of a file; an empty cell is the default."""

        def value(name: str) -> Any:
            try:
                return SETTINGS[name].accepts.parse(cells[name])
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

        given = {name: value(name) for name in cells.keys() & SETTINGS.keys() if cells[name]}
        (request,) = requests_of([cells["model"]], given)
        pruning, hw = Pruning.read(cells["pruning"]), load_hardware(cells["hardware"])
        return cls(parse_ratio(cells["speedup"]), request, pruning, hw)


def judged_file(path: str | Path) -> list[Judgement]:
    """Judge the claims of a CSV file with :data:`COLUMNS`."""
    table = read_csv(read_bounded(path), str(path), REQUIRED)
    for name in table.header:
        if name not in COLUMNS:
            raise unknown(f"{path}: column", name, COLUMNS)
    return table.each(lambda cells: judge(Claim.read(cells)))


@dataclass(frozen=True)
class Cause:
    """A condition other than the stated one, with the speedup that it would give."""

    kind: str  # phase, batch, gpu, graphs, host, prefix or code
    name: str
    speedup: float
    speedup_lower: float
    speedup_upper: float

    @classmethod
    def of(cls, kind: str, name: str, r: Result) -> Cause:
        return cls(kind, name, r.speedup, r.speedup_lower, r.speedup_upper)

    @classmethod
    def between(cls, kind: str, name: str, dense: Result, pruned: Result) -> Cause:
        """Return the speedup of a pruned model over a dense model in another request; their errors
        count as independent."""
        value = dense.dense_s / pruned.pruned_s
        half = math.hypot(
            math.log(dense.dense_upper / dense.dense_s),
            math.log(pruned.pruned_upper / pruned.pruned_s),
        )
        return cls(kind, name, value, value * math.exp(-half), value * math.exp(half))


@dataclass(frozen=True, repr=False)
class Judgement(HasResult):
    """A claimed speedup next to its prediction."""

    result: Result
    claimed: float
    probability: float  # share of outcomes that are at least as far from the prediction
    # whether the claim is above the roofline bound and above the interval: a prediction is above
    # its bound where the dense model's kernels are farther from their roofline
    breaks_bound: bool
    causes: tuple[Cause, ...]  # the likeliest first

    @property
    def unlikely(self) -> bool:
        return self.probability < UNLIKELY

    @property
    def each_kind(self) -> tuple[Cause, ...]:
        """The likeliest condition of each kind."""
        return tuple(some[0] for some in by_key(self.causes, attrgetter("kind")).values())

    @property
    def explanation(self) -> str:
        """The likeliest condition, with its speedup, unless it hardly explains the claim."""
        if not self.causes or self.of_cause(self.causes[0]) < EXPLAINS:
            return "none of the named conditions"
        return f"{self.causes[0].name}, {speedup_text(self.causes[0])}"

    def of_cause(self, cause: Cause) -> float:
        """Return the probability of the claim under another condition."""
        return _probability(_deviation(self.claimed, cause, self.result.level)[0])

    @property
    def sentence(self) -> str:
        """The answer: the probability, the bound, and what would explain an unlikely claim."""
        r, claimed = self.result, f"{self.claimed:g}x"
        verdict = "unlikely" if self.unlikely else "plausible"
        bound = f"{'breaks' if self.breaks_bound else 'does not break'} the roofline bound of"
        text = (
            f"{claimed} for {r.pruning} of {r.model} on {setting(r)} is {verdict} (probability"
            f" {probability_text(self.probability)}; predicted {speedup_text(r)}) and {bound}"
            f" {ratio(r.roofline_bound)}x"
        )
        return (
            f"{text}; likeliest explanation: {self.explanation}." if self.unlikely else f"{text}."
        )

    def _title(self) -> str:
        return self.sentence

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "explanation": self.explanation}


def judge_claim(
    claimed: float, model: str | Model, prune: str, hardware: str | HardwareProfile, **settings: Any
) -> Judgement:
    """Judge a claimed speedup: its probability, its bound, and which other conditions give it.

    Parameters
    ----------
    claimed : float
        The claimed speedup.
    model : str or Model
        Name, path or shapes of the dense model.
    prune : str
        Pruning as text, such as ``"width mlp=0.3 heads=0.2"``, or the path of a plan.
    hardware : str or HardwareProfile
        The device.
    **settings
        Fields of :class:`simulator.Request`, such as ``phase``, ``batch``, ``seq`` and ``engine``.

    Returns
    -------
    Judgement
        The prediction, the probability of the claim, and other conditions with their speedups: the
        phase, the batch, the GPU, CUDA graphs, the host, a cached prompt, modelling code.

    Raises
    ------
    InputError
        As :func:`simulator.predict`.

    Examples
    --------
    >>> found = judge_claim(1.25, "llama-3.1-8b", "depth 0.25", "h100")
    >>> found.unlikely, found.breaks_bound
    (False, False)
    """
    (request,) = requests_of([Request(model=model, **known(settings)).model], settings)
    return judge(Claim(claimed, request, Pruning.read(prune), load_hardware(hardware)))


def judge(claim: Claim) -> Judgement:
    (result,) = request_results([claim.request], [claim.pruning], [claim.hardware])
    causes = tuple(_causes(claim, result))
    kinds = Counter(cause.kind for cause in causes)

    def log_weight(cause: Cause) -> float:
        deviation, sd = _deviation(claim.speedup, cause, result.level)
        return -0.5 * deviation**2 - math.log(sd * kinds[cause.kind])

    return Judgement(
        result,
        claim.speedup,
        _probability(_deviation(claim.speedup, result, result.level)[0]),
        claim.speedup > max(result.roofline_bound, result.speedup_upper),
        tuple(sorted(causes, key=log_weight, reverse=True)),
    )


def _deviation(claimed: float, predicted: HasSpeedup, level: float) -> tuple[float, float]:
    """Return how many standard deviations the log of a claim is from a predicted speedup, and the
    size of one on this side. A printed claim is known to half a unit of its last digit."""
    half_unit = 0.5 * 10.0 ** -len(repr(float(claimed)).partition(".")[2])
    nearest = min(max(predicted.speedup, claimed - half_unit), claimed + half_unit)
    log = math.log(nearest / predicted.speedup)
    end = predicted.speedup_upper if log > 0.0 else predicted.speedup_lower
    half_width = abs(math.log(end / predicted.speedup))
    sd = max(half_width / NormalDist().inv_cdf(0.5 + 0.5 * level), SMALLEST_LOG_SD)
    return log / sd, sd


def _probability(deviation: float) -> float:
    return math.erfc(abs(deviation) / math.sqrt(2.0))


def _causes(claim: Claim, stated: Result) -> Iterator[Cause]:
    """Yield the conditions that may have been measured instead of the stated ones."""
    request = claim.request
    for phase in PHASES:
        for r in _predicted(claim, {"phase": phase}) if phase != request.phase else ():
            yield Cause.of("phase", f"{phase} instead of {request.phase}", r)
    for r in _predicted(claim, *({"batch": b} for b in BATCHES if b != request.batch)):
        yield Cause.of("batch", f"batch {r.batch} instead of {request.batch}", r)
    devices = [hw for hw in map(load_hardware, GPUS) if hw.label != claim.hardware.label]
    for r in _predicted(claim, {}, hardware=devices):
        yield Cause.of("gpu", f"{r.hardware} instead of {stated.hardware}", r)
    cached = float((request.seq - 1) // CACHE_BLOCK * CACHE_BLOCK)
    if request.phase != "decode" and cached > stated.cached_prefix:
        for r in _predicted(claim, {"cached_prefix": cached}):
            yield Cause.of("prefix", "cached prompts", r)
            yield Cause.between("prefix", "prompts cached for the pruned model alone", stated, r)
    yield from _engine_causes(claim, stated)


def _engine_causes(claim: Claim, stated: Result) -> Iterator[Cause]:
    engine = load_engine(claim.request.engine)
    if engine.graph:
        for r in _predicted(claim, {"engine": EAGER}):
            yield Cause.of("host", f"both host-bound, without CUDA graphs ({EAGER})", r)
            name = f"a dense model without CUDA graphs ({EAGER})"
            yield Cause.between("graphs", name, r, stated)
    else:
        for r in _predicted(claim, {"engine": GRAPHS}):
            yield Cause.of("graphs", f"CUDA graphs ({GRAPHS})", r)
        for r in _predicted(claim, {"dense_s": SLOW_HOST * stated.dense_s}):
            yield Cause.of("host", f"a host that makes the dense model {SLOW_HOST:g}x slower", r)
    if (slower := engine.own_code.value) > 1.0:
        # published slowdowns: from none to about the square of the engine's
        ends = stated.speedup_lower / slower**2, stated.speedup_upper
        name = "custom modelling code of the pruned model"
        yield Cause("code", name, stated.speedup / slower, *ends)


def _predicted(
    claim: Claim, *changes: Mapping[str, Any], hardware: Sequence[HardwareProfile] = ()
) -> Iterator[Result]:
    """Yield the pruning's results with other shapes, or another setting, on other devices; those
    that cannot run or do not fit into the memory are omitted."""
    try:
        requests = [replace(claim.request, **{"dense_s": None, **change}) for change in changes]
        devices = hardware or [claim.hardware]
        found = request_results(requests, [claim.pruning], devices, lambda *_: None)
    except InputError:
        return
    yield from (r for r in found if r.dense_fits and r.pruned_fits)
