"""Two decoders timed in turns, pass by pass: what disturbs the machine disturbs both, and their ratio least of all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from calibration.devices.protocol import Unsupported
from calibration.execute.decoder.model import Decoder
from calibration.execute.decoder.run import decode, prefill
from calibration.measure.timing import median_interval
from simulator.predict.settings import one_of
from simulator.workload import PHASES, RUNTIMES

WINDOW_S = 4e-3
PRECISION = 0.005
LEAST, ENOUGH, MOST = 3, 8, 200
"""Pairs taken at least, pairs after which a precise ratio ends the measurement, and pairs at most."""


@dataclass(frozen=True)
class PairTimes:
    """Raw samples of two decoders, s a pass, one of each a pair; ``loops`` passes a sample."""

    first_s: tuple[float, ...]
    second_s: tuple[float, ...]
    loops: int


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

    Prefill leaves out drawing the next token; decode repeats one step at the same position, after ``seq`` cached ones,
    launched eagerly or from a CUDA graph. The time limit is for the pairs after a first pass of each; at least
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
    while len(found[0]) < MOST:
        order = (0, 1) if len(found[0]) % 2 == 0 else (1, 0)
        for i in order:
            found[i].append(samplers[i](loops))
        spent = clock() - start
        if spent >= time_limit_s and (len(found[0]) >= LEAST or spent >= 3.0 * time_limit_s):
            break
        if len(found[0]) >= ENOUGH:
            middle, low, high = median_interval([a / b for a, b in zip(*found, strict=True)])
            if high - low <= 2.0 * PRECISION * middle:
                break
    return PairTimes(tuple(found[0]), tuple(found[1]), loops)


def _ready(
    decoder: Decoder, batch: int, seq: int, phase: str, runtime: str, clock: Callable[[], float]
) -> Callable[[int], float]:
    """A function that runs a number of passes and returns the time of one."""
    cuda = decoder.place.startswith("cuda")
    graph = phase == "decode" and runtime == "cuda_graph"
    if graph and not cuda:
        raise Unsupported(f"cuda_graph: device {decoder.place!r} has no CUDA graphs")
    if graph and decoder.rule is not None and decoder.rule.on_host:
        raise Unsupported(
            f"cuda_graph: {decoder.rule.family} decides on the host which kernels run, so no graph can hold it"
        )
    tokens = torch.randint(len(decoder.embedding), (batch, seq), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(decoder.place)
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
    """The step as a CUDA graph; positions and lengths are those of the recording, which is the step that is timed."""
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
