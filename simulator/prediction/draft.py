"""Predict speculative decoding with a pruned model as the draft: :func:`draft`.

A round is g passes of the draft, which add a token each, and one step of the target that checks the
g tokens of each sequence (a decode step with g + 1 positions). With acceptance a per token,
independent, a round makes (1 - a^(g+1)) / (1 - a) tokens (Leviathan et al., arXiv 2211.17192). A
round is one workload, so that errors that the draft, the check and the dense step have in common
cancel in the speedup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.arguments import OneOrMore, Range, listed, number
from simulator.arrays import FloatArray
from simulator.capacity import memory
from simulator.display import Displayed, by_column
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.prediction.notes import computed_wide, dense_notes, overridden, uncalibrated
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import computed_on
from simulator.prediction.result import Results
from simulator.prediction.table import speedups
from simulator.pruning import prune as pruned_by
from simulator.request import Request, known
from simulator.workload import Workload

DRAFTED: tuple[int, ...] = tuple(range(1, 9))
ACCEPTANCES: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9)
MOST_DRAFTED = 64
_COUNT = Range(1, MOST_DRAFTED, f"a whole number from 1 to {MOST_DRAFTED}", whole=True)
_SHARE = Range(0.0, 1.0, "a number from 0 to 1")
# acceptances among which the one is found from which a draft pays
_FINE = np.linspace(0.0, 1.0, 10_001)


@dataclass(frozen=True)
class Draft:
    """Speculative decoding of one batch with one number of drafted tokens at one acceptance; times
    in s."""

    batch: int
    drafted: int  # tokens per round and sequence
    acceptance: float  # per token; of acceptances by position their mean
    tokens: float  # made per round and sequence
    speedup: float  # tokens per second over those of the dense target
    speedup_lower: float
    speedup_upper: float
    best: bool  # whether no other number of drafted tokens is faster
    pays_from: float | None  # acceptance from which the draft is faster than none; None: at none
    pays_from_lower: float | None
    pays_from_upper: float | None
    dense_s: float  # a step of the dense target
    draft_s: float  # a pass of the draft, the mean of a round
    check_s: float  # a step of the target that checks the drafted tokens
    memory_bytes: float  # target, draft and both caches, on the fullest device
    fits: bool


@dataclass(frozen=True, repr=False)
class Drafts(Displayed):
    """Speculative decoding by batch, acceptance and number of drafted tokens.

    Iterating yields a :class:`Draft` for each of them; :meth:`best` returns those of the fastest
    numbers.
    """

    target: str  # how it is pruned, too
    draft: str  # how the draft is made
    hardware: str
    engine: str
    devices: int
    power_limit: float | None  # power limit of each device, W
    seq: int
    level: float
    shared: bool  # whether the draft runs layers of the target, so weights and cache are shared
    rows: tuple[Draft, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def best(self) -> tuple[Draft, ...]:
        """Return the rows of the fastest number of drafted tokens of each batch and acceptance."""
        return tuple(row for row in self.rows if row.best)

    def _title(self) -> str:
        return (
            f"{self.draft} as a draft for {self.target} on {self.hardware}, {len(self.rows)} rows"
        )

    def _columns(self) -> Any:
        return by_column([vars(row) for row in self.rows])


def draft(
    model: str | Model,
    prune: str = "",
    hardware: str | HardwareProfile = "h100",
    *,
    draft: str | Model | None = None,
    target_prune: str = "",
    batch: OneOrMore[int] = 1,
    drafted: OneOrMore[int] = DRAFTED,
    acceptance: OneOrMore[float] = ACCEPTANCES,
    by_position: Sequence[float] = (),
    **settings: Any,
) -> Drafts:
    """Predict how much faster a model decodes if a pruned model drafts its tokens.

    Parameters
    ----------
    model : str or Model
        The target. The output stays its own (that of the pruned target with ``target_prune``).
    prune : str
        Pruning of the draft, such as ``"depth 0.5"``.
    hardware : str or HardwareProfile
        The device that runs both.
    draft : str or Model, optional
        Model of the draft, with the vocabulary of the target. Default: the target itself.
    target_prune : str
        Pruning of the target; speedups are over the dense target.
    batch : one or more int
        Sequences, at least 1.
    drafted : one or more int
        Tokens that the draft adds per round and sequence, 1 to 64.
    acceptance : one or more float
        Probability, 0 to 1, with which the target accepts a drafted token.
    by_position : sequence of float
        Measured acceptances of the first, second, ... drafted token, instead of ``acceptance``.
        Numbers of drafted tokens beyond them are excluded.
    **settings
        Fields of :class:`simulator.Request` except ``phase``, ``batch`` and ``new_tokens``.

    Returns
    -------
    Drafts
        A :class:`Draft` for each batch, acceptance and number of drafted tokens, in this order.

    Raises
    ------
    InputError
        If draft and target are the same dense model, have different vocabularies, or an argument is
        out of range.

    Examples
    --------
    >>> import simulator
    >>> found = simulator.draft(
    ...     "llama-3.1-70b", hardware="h200", devices=2, draft="llama-3.1-8b", acceptance=0.8
    ... )
    >>> [(row.batch, row.drafted, round(row.speedup, 1)) for row in found.best()]
    [(1, 4, 2.0)]
    """
    target, hw = load_model(model), load_hardware(hardware)
    drafter = _Drafter.of(target, draft, prune)
    for name in {"phase", "new_tokens", "dense_s", "positions"} & settings.keys():
        raise InputError(
            f"{name}: expected no such setting, because a draft is predicted in decode"
        )
    counts, cases = _cases(drafted, acceptance, by_position)
    rows = list[Draft]()
    for many in listed("batch", batch):
        request = Request(model=target, batch=many, **known(settings))
        computed = computed_on(request, hw, [drafter.model])
        rounds = _Rounds.of(computed, drafter, target_prune, counts, hw)
        rows += [row for case in cases for row in rounds.rows(*case)]
    return Drafts(
        target=_named(target, Pruning.read(target_prune) if target_prune else None),
        draft=_named(drafter.model, drafter.pruning),
        hardware=hw.label,
        engine=request.engine,
        devices=request.devices,
        power_limit=request.power_limit,
        seq=request.seq,
        level=request.level,
        shared=drafter.shared,
        rows=tuple(rows),
        notes=(
            *overridden(request, (target, drafter.model)),
            *computed_wide(request, [hw], [drafter.model]),
            *dense_notes(rounds.timed, request, [hw]),
            *uncalibrated(rounds.timed),
        ),
    )


def _named(model: Model, pruning: Pruning | None) -> str:
    return f"{model.name} pruned by {pruning.title}" if pruning else model.name


def _cases(
    drafted: OneOrMore[int], acceptance: OneOrMore[float], by_position: Sequence[float]
) -> tuple[list[int], list[tuple[float, FloatArray]]]:
    """Return the numbers of drafted tokens, and the acceptances of each case by position with the
    number that names the case."""
    counts = [int(number("drafted", g, _COUNT)) for g in listed("drafted", drafted)]
    positions = np.array(
        [number("by_position", a, _SHARE) for a in listed("by_position", by_position)]
    )
    if len(positions) and not (counts := [g for g in counts if g <= len(positions)]):
        raise InputError(
            f"by_position: expected an acceptance per drafted token, got {len(positions)}"
        )
    each = [number("acceptance", a, _SHARE) for a in listed("acceptance", acceptance)]
    if len(positions):
        return counts, [(float(positions.mean()), positions)]
    return counts, [(a, np.full(max(counts), a)) for a in each]


@dataclass(frozen=True)
class _Drafter:
    """The model of the draft and its pruning."""

    model: Model
    prune: str
    pruning: Pruning | None
    shared: bool  # whether it runs layers of the target

    @classmethod
    def of(cls, target: Model, draft: str | Model | None, prune: str) -> _Drafter:
        model = target if draft is None else load_model(draft)
        pruning = Pruning.read(prune) if prune else None
        if model == target and pruning is None:
            raise InputError(
                "draft: expected another model (--draft) or a pruning of the target (--prune), got"
                " neither"
            )
        if model.vocab != target.vocab:
            expected = f"expected the vocabulary of {target.name} ({target.vocab:,} tokens)"
            raise InputError(f"draft {model.name}: {expected}, got {model.vocab:,}")
        layers = pruning is not None and set(pruning.family.split("+")) == {"depth"}
        return cls(model, prune, pruning, shared=model == target and layers)


@dataclass(frozen=True)
class _Rounds:
    """Rounds of one batch with some numbers of drafted tokens."""

    batch: int
    counts: Sequence[int]
    timed: Results  # a check per number, then a round per number, as pruned versions of the step
    memory_bytes: float
    fits: bool

    @classmethod
    def of(
        cls,
        request: Request,
        drafter: _Drafter,
        target_prune: str,
        counts: Sequence[int],
        hw: HardwareProfile,
    ) -> _Rounds:
        drafting = replace(request, model=drafter.model)
        dense, step = lower(request), _pruned(lower(drafting), drafter.prune)
        checks = [_pruned(lower(request, positions=g + 1), target_prune) for g in counts]
        rounds = [
            Workload.concat([*_passes(drafting, drafter.prune, g), w])
            for g, w in zip(counts, checks, strict=True)
        ]
        every = [w.replace(meta=dense.meta) for w in (*checks, *rounds)]
        once, whole = memory(step, hw), memory(checks[-1], hw)
        needed = whole.total_bytes
        if not drafter.shared:
            needed += once.weights_bytes + once.cache_bytes
        return cls(
            batch=request.batch,
            counts=counts,
            timed=speedups(dense, every, hw, request.level),
            memory_bytes=needed,
            fits=needed <= whole.capacity_bytes,
        )

    def rows(self, acceptance: float, accepted: FloatArray) -> list[Draft]:
        rows = [self.row(i, acceptance, accepted) for i in range(len(self.counts))]
        fastest = max(row.speedup for row in rows)
        return [replace(row, best=row.speedup == fastest) for row in rows]

    def row(self, i: int, acceptance: float, accepted: FloatArray) -> Draft:
        """Return speculative decoding with the ``i``-th number of drafted tokens."""
        check, whole, drafted = self.timed[i], self.timed[len(self.counts) + i], self.counts[i]
        tokens = 1.0 + float(np.cumprod(accepted[:drafted]).sum())
        made = (_FINE[:, None] ** np.arange(drafted + 1)).sum(axis=1)  # rises with the acceptance
        pays = [
            float(np.interp(1.0 / ratio, made, _FINE)) if ratio * made[-1] >= 1.0 else None
            for ratio in (whole.speedup, whole.speedup_upper, whole.speedup_lower)
        ]
        return Draft(
            batch=self.batch,
            drafted=drafted,
            acceptance=acceptance,
            tokens=tokens,
            speedup=tokens * whole.speedup,
            speedup_lower=tokens * whole.speedup_lower,
            speedup_upper=tokens * whole.speedup_upper,
            best=False,
            pays_from=pays[0],
            pays_from_lower=pays[1],
            pays_from_upper=pays[2],
            dense_s=whole.dense_s,
            draft_s=(whole.pruned_s - check.pruned_s) / drafted,
            check_s=check.pruned_s,
            memory_bytes=self.memory_bytes,
            fits=self.fits,
        )


def _passes(request: Request, prune: str, drafted: int) -> list[Workload]:
    """Return the passes of the draft in a round. The first also computes what the target accepted:
    in Transformers two positions, in engines with graphs, whose shapes are fixed, the g + 1 checked
    and the next (vLLM 0.32, ``set_inputs_first_pass``). There, passes of the draft follow each
    other without the scheduler."""
    graph = load_engine(request.engine).in_graph("decode")
    positions = drafted + 2 if graph else 2
    first = _pruned(lower(request, positions=positions), prune)
    # the head of the first pass computes one position
    sampled = first.is_role("lm_head", "all_gather", "softcap")
    first = first.replace(m=np.where(sampled, first.m // positions, first.m))
    passes = [first, _pruned(lower(request), prune)] if drafted > 1 else [first]
    if graph:  # the time of the host belongs to a pass that has an embedding
        passes = [w.take(~w.is_role("embedding")) for w in passes]
    return [w.replace(count=max(i * (drafted - 1), 1) * w.count) for i, w in enumerate(passes)]


def _pruned(w: Workload, text: str) -> Workload:
    return pruned_by(w, text) if text else w
