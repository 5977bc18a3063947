"""Times of a server's steps, from tables of passes that the cost model predicts.

A step computes prompt tokens, decoding sequences, or both. Its projections run once over all
tokens, attention and recurrences run by kind:

    time = shared(tokens) + head(positions) + prompts(tokens, context) + decodes(sequences, context)

``shared`` is the time of the operators that prefills and decode steps have in common; ``prompts``
and ``decodes`` are the times of passes of one kind without it, so a pass of one kind has the time
that the cost model predicts. The context of prompt tokens is the mean number of positions to which
they attend.

Errors of kernels and of the host are the same for all steps of a run (:class:`Errors`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from simulator.arrays import Array, BoolArray, FloatArray, IndexArray
from simulator.capacity import DeviceMemory, activation_bytes, cache_bytes, weights_bytes
from simulator.codes import COLLECTIVE, ELEMENTWISE, EXPERTS, GEMM
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.power import Power, datasheet_times
from simulator.request import Request
from simulator.serving.served import Steps
from simulator.serving.server import Server
from simulator.uncertainty.factors import COVERAGE_FACTOR, level_scale
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import device_errors
from simulator.workload import WorkloadBatch

_TOKENWISE = (GEMM, EXPERTS, ELEMENTWISE, COLLECTIVE)
"""Kinds of operators that compute tokens without regard to their sequences."""
_FIRST_CONTEXT = 64  # positions
_HEAD_SEGMENT = 2


class Errors(NamedTuple):
    """Errors that all steps of a run share, in half-widths of an interval."""

    kernels: float = 0.0  # shared with the dense model
    own: float = 0.0  # error of the pruned model's kernels alone
    passes: float = 0.0  # error of the host per pass, and of the front end
    work: float = 0.0  # error of the host per sequence and launch


TYPICAL = Errors()


@dataclass(frozen=True)
class Grid:
    """Passes of the tables of a server."""

    sequences: list[int]  # sequences of decode steps
    contexts: list[int]
    tokens: list[int]  # tokens of all operators that prompts and decodes share
    prompts: list[int]  # prompt tokens

    @classmethod
    def of(cls, server: Server, longest: int, requests: int) -> Grid:
        """Return the grid for requests of at most ``longest`` tokens, ``requests`` at once."""
        sequences, prompts = min(server.sequences, requests), server.tokens
        if not server.chunked:
            prompts = max(prompts, longest)
        return cls(
            sequences=_steps(1, sequences, 2),
            # multiples of the first, so caches have whole blocks
            contexts=_steps(_FIRST_CONTEXT, -(-longest // _FIRST_CONTEXT) * _FIRST_CONTEXT, 1),
            tokens=_steps(1, prompts + sequences, 2),
            prompts=_steps(1, prompts, 1),
        )

    def decode_requests(self, request: Request) -> list[Request]:
        """Return the decode steps: sequences by contexts, then further numbers of tokens."""
        pairs = [(d, c) for d in self.sequences for c in self.contexts]
        pairs += [(n, 1) for n in self.tokens]
        one = replace(request, phase="decode", cached_prefix=0.0, token_budget=None)
        return [replace(one, batch=d, seq=c) for d, c in pairs]

    def prefill_requests(self, request: Request) -> list[Request]:
        """Return the prefills: tokens by contexts. Short contexts are those of several prompts,
        long ones those of a chunk after computed tokens."""
        out, one = [], replace(request, phase="prefill", token_budget=self.prompts[-1])
        for tokens in self.prompts:
            for context in self.contexts:
                prompts = max(tokens // (2 * context), 1)
                each = tokens // prompts
                past = max(context - each // 2, 0) if prompts == 1 else 0
                out.append(replace(one, batch=prompts, seq=past + each, cached_prefix=float(past)))
        return out


def _steps(first: int, last: int, each: int) -> list[int]:
    """Return at least two whole numbers from ``first`` to ``last``, ``each`` per doubling."""
    last = max(last, 2 * first)
    powers = first * 2 ** np.arange((last // first).bit_length())
    between = np.concatenate([powers + powers * i // each for i in range(each)])
    return [*np.unique(between[between < last]).tolist(), last]


@dataclass(frozen=True)
class Cache:
    """Memory of the cache on the fullest device, bytes."""

    memory: float  # memory of the device
    weights: float
    activations: float
    lengths: list[int]
    each: FloatArray  # bytes of one sequence at each length

    def tokens(self, server: Server, shortest: float, longest: float) -> tuple[float, float]:
        """Return how many tokens the cache holds, and the tokens that a sequence counts besides its
        length, for sequences between two lengths."""
        first = float(self.lengths[0])
        ends = max(min(shortest, 0.5 * longest), first), max(longest, 2.0 * first)
        low, high = np.interp(ends, self.lengths, self.each)
        slope = max((high - low) / (ends[1] - ends[0]), 1e-9)
        memory = DeviceMemory(self.memory, server.memory, server.share_of)
        left = memory.for_cache(self.weights, self.activations)
        return float(left / slope), float(max(low / slope - ends[0], 0.0))


@dataclass(frozen=True)
class StepTimes:
    """Times of the steps of one model, s, with some errors."""

    grid: Grid
    errors: Errors
    scale: float  # deviations of an interval's half-width
    # by every number of tokens
    shared: list[float]
    head: list[float]
    host: list[float]  # host time of a step without decodes
    # on the grid
    prompts: list[list[float]]  # by tokens and context
    decodes: list[list[float]]  # by sequences and context, with the host's time
    mixed: list[list[float]]  # the same in a step that also computes prompts
    cache: Cache
    _lines: dict[int, list[float]] = field(init=False, default_factory=dict, repr=False)

    def decode(self, sequences: int, context: float) -> float:
        """Return the time of a decode step."""
        line = self._lines.get(sequences)
        if line is None:
            i, part = _place(self.grid.sequences, sequences)
            fixed = self.shared[sequences] + self.head[sequences]
            below, above = self.decodes[i], self.decodes[i + 1]
            line = [fixed + a + part * (b - a) for a, b in zip(below, above)]
            self._lines[sequences] = line
        i, part = _place(self.grid.contexts, context)
        return line[i] + part * (line[i + 1] - line[i])

    def step(
        self, tokens: int, past: float, ends: int, sequences: int = 0, context: float = 0.0
    ) -> float:
        """Return the time of a step with prompt ``tokens`` that attend to ``past`` positions on
        average, of which ``ends`` prompts end, and with decoding ``sequences``."""
        time = _between(
            self.prompts,
            _place(self.grid.prompts, tokens),
            _place(self.grid.contexts, past),
        )
        time += self.shared[tokens + sequences] + self.head[ends + sequences]
        if not sequences:
            return time + self.host[tokens]
        return time + _between(
            self.mixed,
            _place(self.grid.sequences, sequences),
            _place(self.grid.contexts, context),
        )

    def each(self, steps: Steps) -> FloatArray:
        """Return the time of one step of each entry."""
        times = [
            self.step(tokens, past, ends, sequences, context)
            if tokens
            else self.decode(sequences, context)
            for tokens, sequences, (context, past, ends) in zip(
                steps.tokens, steps.sequences, steps.about
            )
        ]
        return np.array(times)


def _between(table: list[list[float]], row: tuple[int, float], column: tuple[int, float]) -> float:
    """Return the value of a table between its rows and columns."""
    (i, down), (j, right) = row, column
    low, high = table[i], table[i + 1]
    above = low[j] + right * (low[j + 1] - low[j])
    below = high[j] + right * (high[j + 1] - high[j])
    return above + down * (below - above)


def _place(axis: list[int], value: float) -> tuple[int, float]:
    """Return the cell of an axis that has a value, and the value's place in it; values below the
    first are the first."""
    i = min(max(bisect_right(axis, value), 1), len(axis) - 1) - 1
    if value <= axis[i]:
        return i, 0.0
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])


@dataclass(frozen=True)
class _Passes:
    """Predicted passes of one phase: those of the dense model and of the pruned models by request,
    with the errors of their times on the device."""

    p: PredictedPass
    log_sd: FloatArray
    shared: FloatArray  # correlation of errors with the dense model's

    @classmethod
    def of(cls, batch: WorkloadBatch, hw: HardwareProfile, level: float) -> _Passes:
        p = forward_passes(batch, hw, level)
        return cls(p, *device_errors(p, batch.dense))

    def of_model(self, model: int) -> IndexArray:
        """Return the passes of a model (0: dense) in the order of the requests."""
        batch = self.p.workloads
        mine = np.flatnonzero(batch.pruning == model - 1)
        return mine[np.argsort(batch.dense[mine])]

    def times(self, errors: Errors, scale: float, which: BoolArray) -> FloatArray:
        """Return the time of some groups of operators of all passes on the device."""
        return np.asarray(self.p.group_s[:, which].sum(axis=1) * self.slower(errors, scale))

    def slower(self, errors: Errors, scale: float) -> FloatArray:
        """Return the factor of errors on the times of all passes."""
        own = np.sqrt(1.0 - self.shared**2)
        error = scale * self.log_sd * (errors.kernels * self.shared + errors.own * own)
        return np.exp(error)

    @cached_property
    def work_s(self) -> tuple[FloatArray, ...]:
        """Times (W, G) of the work of groups, by part of :data:`simulator.power.PARTS` without the
        first."""
        workloads = self.p.workloads
        rows = self.p.row_s, *datasheet_times(workloads, self.p.hw)
        return tuple(map(workloads.groups.sums, rows))

    def host(self, errors: Errors, scale: float) -> FloatArray:
        """Return the host's part of all passes."""
        speeds = self.p.host.speeds(scale * errors.passes, scale * errors.work)
        return np.maximum(self.p.at(*speeds)[0] - self.p.device_s, 0.0)


@dataclass(frozen=True)
class _Work(_Passes):
    """The passes with the energy of their work, J, in place of times."""

    parts: Sequence[FloatArray]  # W, times of the work

    def times(self, errors: Errors, scale: float, which: BoolArray) -> FloatArray:
        active, *others = (part[:, which].sum(axis=1) for part in self.parts)
        return np.asarray(active * self.slower(errors, scale) + sum(others))

    def host(self, errors: Errors, scale: float) -> FloatArray:
        return np.zeros(len(self.log_sd))


@dataclass(frozen=True)
class StepTables:
    """Times of the steps of the dense model (0) and of pruned models (1, ...)."""

    grid: Grid
    decodes: _Passes
    prefills: _Passes
    memory_bytes: float
    level: float
    sampler: tuple[float, float] = (0.0, 0.0)  # s per output token, and deviation of its log

    @classmethod
    def of(
        cls,
        grid: Grid,
        request: Request,
        hw: HardwareProfile,
        batch: Callable[[list[Request]], WorkloadBatch],
    ) -> StepTables:
        """Return the tables of a grid; ``batch`` makes the workloads of all models of requests."""
        decodes, prefills = (
            _Passes.of(batch(made(request)), hw, request.level)
            for made in (grid.decode_requests, grid.prefill_requests)
        )
        return cls(grid, decodes, prefills, float(hw.memory_bytes), request.level)

    @property
    def power(self) -> Power:
        """The power of each device."""
        p = self.decodes.p
        return Power.of(p.hw, p.workloads.rows.meta.asked.power_limit)

    def work(self, watts: FloatArray) -> StepTables:
        """Return tables of the energy of the steps' work on a device, J, in place of times;
        ``watts`` are those of :data:`simulator.power.PARTS`. The idle power is excluded."""
        decodes, prefills = (
            _Work(one.p, one.log_sd, one.shared, [w * s for w, s in zip(watts[1:], one.work_s)])
            for one in (self.decodes, self.prefills)
        )
        return replace(self, decodes=decodes, prefills=prefills, sampler=(0.0, 0.0))

    def at(self, model: int = 0, errors: Errors = TYPICAL) -> StepTimes:
        """Return the times of one model with some errors."""
        decodes, prefills, grid = self.decodes, self.prefills, self.grid
        groups, scale = decodes.p.workloads.groups, self._scale
        after = groups.segment % 3 == _HEAD_SEGMENT
        common = np.isin(groups.role, prefills.p.workloads.groups.role)
        common &= np.isin(groups.kind, _TOKENWISE) & ~after
        of_decodes, of_prefills = decodes.of_model(model), prefills.of_model(model)
        cells = len(grid.sequences) * len(grid.contexts)
        shared, head = (
            decodes.times(errors, scale, which)[of_decodes[cells:]] for which in (common, after)
        )
        sampler_s, log_sd = self.sampler
        head = head + sampler_s * np.exp(scale * log_sd * errors.work) * np.array(grid.tokens)
        every = np.ones(len(groups.segment), dtype=bool)
        rest = decodes.times(errors, scale, every & ~after)[of_decodes[:cells]]
        rest = rest.reshape(len(grid.sequences), -1)
        of_host = decodes.host(errors, scale)[of_decodes[:cells]].reshape(rest.shape)
        rest = rest - np.interp(grid.sequences, grid.tokens, shared)[:, None] + of_host
        prompts = prefills.times(errors, scale, self._inside)[of_prefills]
        prompts -= np.interp(self._tokens[of_prefills], grid.tokens, shared)
        host = prefills.host(errors, scale)[of_prefills].reshape(len(grid.prompts), -1)
        return StepTimes(
            grid=grid,
            errors=errors,
            scale=scale,
            shared=self._each(grid.tokens, shared),
            head=self._each(grid.tokens, head),
            host=self._each(grid.prompts, host[:, 0]),
            prompts=prompts.reshape(len(grid.prompts), -1).tolist(),
            decodes=rest.tolist(),
            mixed=(rest + self._again(errors, of_decodes[:cells])).tolist(),
            cache=self._cache(of_decodes, of_prefills),
        )

    def _each(self, places: list[int], values: FloatArray) -> list[float]:
        """Return values at every number of tokens; none take no time."""
        found = np.interp(np.arange(self.grid.tokens[-1] + 1), places, values)
        found[0] = 0.0
        return list(found.tolist())

    @cached_property
    def _scale(self) -> float:
        return COVERAGE_FACTOR * level_scale(self.level)

    @cached_property
    def _inside(self) -> BoolArray:
        """Groups of prefills before the head."""
        return np.asarray(self.prefills.p.workloads.groups.segment % 3 != _HEAD_SEGMENT)

    @cached_property
    def _tokens(self) -> Array:
        """Tokens of each prefill."""
        workloads = self.prefills.p.workloads
        embedding = workloads.rows.is_role("embedding")
        return np.asarray(workloads.largest(np.where(embedding, workloads.rows.m, 0)))

    def _again(self, errors: Errors, cells: IndexArray) -> Any:
        """Return what mixed steps add to the attention of decodes: a kernel for prompts that does
        not compute the query heads of a key/value head together reads its cache for each. Latent
        attention has a kernel of its own for decodes."""
        p = self.decodes.p
        mixed = p.engine.schedule.mixed_decodes if p.engine.schedule else None
        if mixed is None or mixed.on != p.hw.architecture:
            return 0.0
        groups, rows = p.workloads.groups, p.workloads.rows
        attention = rows.is_role("attention") & (rows.latent == 0)
        if not attention.any():
            return 0.0
        heads = float((rows.heads[attention] / rows.kv_heads[attention]).max())
        which = np.isin(groups.role, rows.role[attention])
        seconds = self.decodes.times(errors, self._scale, which)[cells]
        more = max(mixed.value * heads, 1.0) - 1.0
        return (more * seconds).reshape(len(self.grid.sequences), -1)

    def _cache(self, of_decodes: IndexArray, of_prefills: IndexArray) -> Cache:
        decodes, prefills = self.decodes.p.workloads, self.prefills.p.workloads
        contexts, weights = self.grid.contexts, float(weights_bytes(decodes)[of_decodes[0]])
        return Cache(
            memory=self.memory_bytes,
            weights=weights,
            activations=float(activation_bytes(prefills)[of_prefills].max()),
            lengths=contexts,
            each=cache_bytes(decodes)[of_decodes[: len(contexts)]],
        )


def step_tables(
    request: Request, hw: HardwareProfile, server: Server, longest: int, requests: int
) -> StepTables:
    """Return the tables of a model without prunings, for requests of at most ``longest`` tokens,
    ``requests`` at once."""
    grid = Grid.of(server, longest, requests)
    tables = StepTables.of(
        grid, request, hw, lambda some: WorkloadBatch.of([lower(one) for one in some])
    )
    if server.sampler is None:
        return tables
    sampler_s = server.sampler.value * load_model(request.model).vocab
    return replace(tables, sampler=(sampler_s, server.sampler.log_sd))
