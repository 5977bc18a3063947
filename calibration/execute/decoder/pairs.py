"""Two decoders timed in turns, pass by pass: what disturbs the machine disturbs both, and their ratio least of all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibration.devices.protocol import Unsupported
from calibration.execute.decoder.model import Decoder
from calibration.execute.decoder.timing import PHASES, _decode_step, _prefill_step, _recorded, _sampler
from calibration.measure.timing import median_interval
from simulator.errors import unknown

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
    """Time a phase of two decoders in turns.

    Parameters
    ----------
    first, second : Decoder
        On one device.
    batch, seq : int
        Sequences; prompt tokens each (cached positions at the decode step that is timed).
    phase : {"prefill", "decode"}
    runtime : {"eager", "cuda_graph"}
        How decode steps are launched.
    time_limit_s : float, s
        For the pairs after a first pass of each; at least :data:`LEAST` are taken unless they take three times as long.
    clock : callable
        Seconds; an argument for the sake of tests.

    Returns
    -------
    PairTimes
        Ends early when the interval (95 %) of the median ratio is within :data:`PRECISION` of it.

    Raises
    ------
    Unsupported
        Without CUDA graphs, or for a family whose kernels depend on its data.
    """
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
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
    tokens = torch.randint(decoder.config.vocab, (batch, seq), generator=torch.Generator().manual_seed(0)).to(
        decoder.place
    )
    if phase == "prefill":
        return _sampler(_prefill_step(decoder, tokens), cuda, clock)
    if runtime not in ("eager", "cuda_graph"):
        raise unknown("runtime", runtime, ("eager", "cuda_graph"))
    if runtime == "eager":
        return _sampler(_decode_step(decoder, tokens), cuda, clock)
    if not cuda:
        raise Unsupported(f"cuda_graph: device {decoder.place!r} has no CUDA graphs")
    if decoder.dynamic.family in ("dynamic_depth", "dynamic_width"):
        raise Unsupported(
            f"cuda_graph: {decoder.dynamic.family} decides on the host which kernels run, so no graph can hold it"
        )
    return _sampler(_recorded(_decode_step(decoder, tokens)), cuda, clock)
