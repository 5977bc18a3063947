"""Two decoders timed in turns, pass by pass: what disturbs the machine disturbs both, and their ratio least of all.

:func:`time_pair` times two; an :class:`Executor` times the pruned decoders of cases against the dense one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.devices.operators import is_out_of_memory
from calibration.devices.protocol import Device, Unsupported
from calibration.measure.run import FAILED, SKIPPED, UNSUPPORTED
from calibration.measure.timing import OK, median_interval
from calibration.runners.cases import Case
from calibration.runners.decoder.families import prune_decoder
from calibration.runners.decoder.model import Decoder, random_decoder
from calibration.runners.decoder.run import decode, prefill
from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.predict.scenario import one_of
from simulator.workload import PHASES

LONGEST_S = 30.0
"""Time for the pairs of one case, whatever the budget."""
WINDOW_S = 4e-3
PRECISION = 0.005
LEAST, ENOUGH, MOST = 3, 8, 200
"""Pairs taken at least, pairs after which a precise ratio ends the measurement, and pairs at most."""

RUNTIMES: tuple[str, ...] = ("cuda_graph", "eager")
"""How a pass is launched: as one graph, or kernel by kernel."""


@dataclass(frozen=True)
class PairTimes:
    """Raw samples of two decoders, s a pass, one of each a pair."""

    first_s: Sequence[float]
    second_s: Sequence[float]
    loops: int  # passes a sample


def time_pair(
    first: Decoder,
    second: Decoder,
    *,
    batch: int,
    seq: int,
    phase: str,
    runtime: str = "eager",
    time_limit_s: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> PairTimes:
    """Time a phase of two decoders on one device in turns.

    Prefill leaves out drawing the next token; decode repeats one step at the same position, after ``seq`` cached ones.
    Both are launched eagerly or from a CUDA graph. The time limit is for the pairs after a first pass of each; at least
    :data:`LEAST` are taken unless they take three times as long. Ends early when the interval (95 %) of the median
    ratio is within :data:`PRECISION` of it. Unsupported without CUDA graphs, or for a family whose kernels depend on
    its data.
    """
    one_of("phase", phase, PHASES[:2])
    one_of("runtime", runtime, RUNTIMES)
    samplers = [_ready(decoder, batch, seq, phase, runtime, clock) for decoder in (first, second)]
    once = [sample(1) for sample in samplers]  # also warms caches and kernels' choices
    loops = max(1, math.ceil(WINDOW_S / max(min(once), 1e-7)))
    for sample in samplers if loops > 1 else ():
        sample(loops)
    found: tuple[list[float], list[float]] = ([], [])
    start = clock()
    for pair in range(1, MOST + 1):
        for i in (0, 1) if pair % 2 else (1, 0):
            found[i].append(samplers[i](loops))
        spent = clock() - start
        if spent >= time_limit_s and (pair >= LEAST or spent >= 3.0 * time_limit_s):
            break
        if pair >= ENOUGH:
            middle, low, high = median_interval([a / b for a, b in zip(*found, strict=True)])
            if high - low <= 2.0 * PRECISION * middle:
                break
    return PairTimes(*found, loops)


def _ready(
    decoder: Decoder, batch: int, seq: int, phase: str, runtime: str, clock: Callable[[], float]
) -> Callable[[int], float]:
    """A function that runs a number of passes and returns the time of one."""
    cuda = decoder.place.startswith("cuda")
    graph = runtime == "cuda_graph"
    if graph and not cuda:
        raise Unsupported(f"cuda_graph: device {decoder.place!r} has no CUDA graphs")
    if graph and decoder.rule is not None and decoder.rule.on_host(decoder.place):
        why = "decides on the host which kernels run, so no graph can hold it"
        raise Unsupported(f"cuda_graph: {decoder.rule.family} {why}")
    tokens = torch.randint(len(decoder.embedding), (batch, seq), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(decoder.embedding.device)
    step = _decode_step(decoder, tokens) if phase == "decode" else lambda: prefill(decoder, tokens)
    step = _recorded(step) if graph else step

    def sample(loops: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(loops):
            step()
        if cuda:
            torch.cuda.synchronize()
        return (clock() - start) / loops

    return sample


def _decode_step(decoder: Decoder, tokens: Any) -> Callable[[], Any]:
    _, state = prefill(decoder, tokens, room=2)
    mark, token = state.mark(), tokens[:, :1].clone()

    def step() -> Any:
        state.rewind(mark)
        return decode(decoder, token, state)

    return step


def _recorded(step: Callable[[], Any]) -> Callable[[], Any]:
    """A pass as a CUDA graph; positions and lengths are those of the recording, which is the pass that is timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay  # type: ignore[no-any-return]


class Executor:
    """Times cases in turns with the dense decoder; one that cannot run ends as a record with the reason."""

    def __init__(self, device: Device, config: ModelConfig, dtype: str, runtime: str, seed: int) -> None:
        self.device, self.runtime = device, runtime
        self.kept: dict[tuple[str, float], Decoder] = {}  # the one pruned decoder that was made last
        try:
            self.dense = random_decoder(config, dtype=dtype, place=device.name, seed=seed)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fewer = "--layers N takes its first N layers"
            raise InputError(f"{config.name} in {dtype} does not fit on {device.name}; {fewer}") from None

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        """Status, reason and, where it ran, times of a case, building its decoder included in the seconds it has."""
        try:
            return {"status": OK, **self._timed(case, self.device.clock() + seconds)}
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except Exception as error:  # a kernel may raise anything; one family must not end the comparison
            status = SKIPPED if is_out_of_memory(error) else FAILED
            return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}

    def _timed(self, case: Case, end: float) -> dict[str, Any]:
        which = (case.family, case.sparsity)
        if which not in self.kept:
            self.kept.clear()  # before the next one is made: two large models may fit, three not
            self.kept[which] = prune_decoder(self.dense, *which)
        pruned = self.kept[which]
        # the first passes and the cache take their part too
        limit = min(max(0.6 * (end - self.device.clock()), 0.0), LONGEST_S)
        where: dict[str, Any] = {"batch": case.batch, "seq": case.seq, "phase": case.phase, "time_limit_s": limit}
        runtime, why = self.runtime or self._runtime(pruned), ""
        try:
            times = time_pair(self.dense, pruned, **where, runtime=runtime)
        except RuntimeError as error:
            if runtime != "cuda_graph" or self.runtime or is_out_of_memory(error):
                raise
            runtime = "eager"  # what a graph cannot hold is launched one by one
            why = f"not captured: {type(error).__name__}: {error}".splitlines()[0]
            times = time_pair(self.dense, pruned, **where, runtime=runtime)
        found = {"loops": times.loops, "dense_s": times.first_s, "pruned_s": times.second_s}
        return {"reason": why, "runtime": runtime, **found}

    def _runtime(self, pruned: Decoder) -> str:
        graph = pruned.place.startswith("cuda") and not (pruned.rule and pruned.rule.on_host(pruned.place))
        return "cuda_graph" if graph else "eager"
