"""Time two decoders in alternating passes: disturbances affect both, so their ratio is stable.

:func:`time_pair` times two decoders; an :class:`Executor` times the pruned decoders of cases against the dense decoder.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.devices.operators import is_out_of_memory
from calibration.devices.protocol import Device, Unsupported
from calibration.measure.run import FAILED, SKIPPED, UNSUPPORTED
from calibration.measure.timing import OK, median_interval
from calibration.runners.cases import Case
from calibration.runners.decoder.families import prune_by_steps
from calibration.runners.decoder.model import Decoder, random_decoder
from calibration.runners.decoder.run import decode, prefill
from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.prediction.scenario import one_of
from simulator.pruning._steps import Step
from simulator.workload import PHASES, ROLES, Kind, Workload

LONGEST_S = 30.0
"""Maximum time for the pairs of one case."""
WINDOW_S = 4e-3
PRECISION = 0.005
LEAST, ENOUGH, MOST = 3, 8, 200
"""Minimum number of pairs, number after which a precise ratio ends the measurement, and maximum number."""

RUNTIMES: tuple[str, ...] = ("cuda_graph", "eager")
"""Launches of a pass: as one graph, or kernel by kernel."""


@dataclass(frozen=True)
class PairTimes:
    """Raw samples of two decoders, s per pass; a pair has one of each."""

    first_s: Sequence[float]
    second_s: Sequence[float]
    loops: int  # passes per sample


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
    """Time a phase of two decoders on one device in alternation.

    Prefill excludes the choice of the next token; decode repeats one step at the same position, after ``seq`` cached
    positions. Launches are eager or from a CUDA graph. The time limit applies to the pairs after a first pass of each
    decoder; at least :data:`LEAST` pairs are timed, within three times the limit. The measurement ends early if the
    95 % interval of the median ratio is within :data:`PRECISION`. Unsupported: no CUDA graphs, or kernels of the family
    depend on data.
    """
    one_of("phase", phase, PHASES[:2])
    one_of("runtime", runtime, RUNTIMES)
    samplers = [_ready(decoder, batch, seq, phase, runtime, clock) for decoder in (first, second)]
    once = [sample(1) for sample in samplers]  # also warms caches and selects kernels
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
    """Return a function that runs a number of passes and returns the time per pass."""
    cuda = decoder.device.startswith("cuda")
    graph = runtime == "cuda_graph"
    if graph and not cuda:
        raise Unsupported(f"cuda_graph: device {decoder.device!r} has no CUDA graphs")
    if graph and decoder.rule is not None and decoder.rule.on_host(decoder.device):
        raise Unsupported(f"cuda_graph: {decoder.rule.family} selects kernels on the host, which no graph can hold")
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
    """Record a pass as a CUDA graph; replays keep its positions and lengths."""
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


def check_shapes(decoder: Decoder, workload: Workload) -> None:
    """Raise InputError if the projections of a decoder are not those of a workload; a rule decides during a pass."""
    if decoder.rule is not None:
        return
    w = workload.take((workload.kind == Kind.GEMM) & (workload.layer >= 0) & ~workload.overhead)
    expected, found = Counter[tuple[str, int, int, int]](), Counter[tuple[str, int, int, int]]()
    for role, stage, n, k, count in zip(
        w.role.tolist(), w.stage.tolist(), w.n.tolist(), w.k.tolist(), w.count.tolist()
    ):
        expected[ROLES[role], stage, n, k] += round(count)
    for _, role, projection in decoder.projections():
        for stage, factor in enumerate(projection.factors, 1):
            n, k = factor.shape
            found[role, stage if len(projection.factors) > 1 else 0, n, k] += 1
    if different := sorted((expected - found) + (found - expected)):
        role, _, n, k = different[0]
        raise InputError(f"decoder: its shapes are not those that are predicted, such as {role} with n={n}, k={k}")


class Executor:
    """Time cases in alternation with the dense decoder; a case that cannot run gives a record with the reason."""

    def __init__(self, device: Device, config: ModelConfig, dtype: str, runtime: str, seed: int) -> None:
        self.device, self.runtime = device, runtime
        self.kept: dict[tuple[Step, ...], Decoder] = {}  # the last pruned decoder
        try:
            self.dense = random_decoder(config, dtype=dtype, device=device.name, seed=seed)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fewer = "use its first layers with --layers"
            raise InputError(f"{config.name} in {dtype} does not fit on {device.name}; {fewer}") from None

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        """Return status, reason and times of a case; ``seconds`` include making its decoder."""
        try:
            return {"status": OK, **self._timed(case, self.device.clock() + seconds)}
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except Exception as error:  # a kernel may raise any exception; one family must not end the comparison
            status = SKIPPED if is_out_of_memory(error) else FAILED
            return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}

    def _timed(self, case: Case, end: float) -> dict[str, Any]:
        if case.steps not in self.kept:
            self.kept.clear()  # before the next decoder is made: memory may hold two large models, not three
            self.kept[case.steps] = prune_by_steps(self.dense, case.steps)
        pruned = self.kept[case.steps]
        check_shapes(pruned, case.pruned)
        # the first passes and the cache take time too
        limit = min(max(0.6 * (end - self.device.clock()), 0.0), LONGEST_S)

        def timed(runtime: str) -> PairTimes:
            return time_pair(
                self.dense,
                pruned,
                batch=case.batch,
                seq=case.seq,
                phase=case.phase,
                runtime=runtime,
                time_limit_s=limit,
            )

        runtime, reason = self.runtime or self._runtime(pruned), ""
        try:
            times = timed(runtime)
        except RuntimeError as error:
            if runtime != "cuda_graph" or self.runtime or is_out_of_memory(error):
                raise
            runtime = "eager"
            reason = f"not captured: {type(error).__name__}: {error}".splitlines()[0]
            times = timed(runtime)
        return {
            "reason": reason,
            "runtime": runtime,
            "loops": times.loops,
            "dense_s": times.first_s,
            "pruned_s": times.second_s,
        }

    def _runtime(self, pruned: Decoder) -> str:
        graph = pruned.device.startswith("cuda") and not (pruned.rule and pruned.rule.on_host(pruned.device))
        return "cuda_graph" if graph else "eager"
