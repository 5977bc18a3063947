"""Time the pruned decoders of cases in alternation with the dense decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from calibration.devices.operators import is_out_of_memory
from calibration.devices.protocol import CaptureFailed, Device, Sampler
from calibration.records.timing_table import Row
from calibration.runners.cases import (
    Case,
    ModelRun,
    PairRunner,
    alternate,
    counted,
    looped,
)
from calibration.runners.decoder.model import Decoder, check_model, decode, prefill, random_decoder
from calibration.runners.decoder.steps import check_steps, prune_by_steps
from simulator.codes import ROLES, Kind
from simulator.errors import InputError
from simulator.models.model import Model
from simulator.workload import Workload


def time_pair(
    dense: Decoder, pruned: Decoder, case: Case, runtime: str, limit_s: float, device: Device
) -> Row:
    samplers = sampler(dense, case, runtime), sampler(pruned, case, runtime)
    return alternate(*samplers, limit_s, device)


def sampler(decoder: Decoder, case: Case, runtime: str) -> Sampler:
    """Return the sampler of a case; decode repeats one step at the same position."""
    shape = (case.batch, case.seq)
    tokens = torch.randint(
        len(decoder.embedding), shape, generator=torch.Generator().manual_seed(0)
    )
    tokens = tokens.to(decoder.embedding.device)
    if case.phase == "decode":
        _, state = prefill(decoder, tokens, room=2)
        mark = state.mark()
        token = tokens[:, :1].clone()

    def step() -> Any:
        if case.phase == "prefill":
            return prefill(decoder, tokens)
        state.rewind(mark)
        return decode(decoder, token, state)

    wait = torch.cuda.synchronize if decoder.device.startswith("cuda") else lambda: None
    return looped(_recorded(step) if runtime == "cuda_graph" else step, wait)


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
    """Raise InputError if a decoder without a rule has other projections than a workload."""
    if decoder.rule is not None:
        return
    w = workload.take((workload.kind == Kind.GEMM) & (workload.layer >= 0) & ~workload.overhead)
    expected = counted(w, "role", "stage", "n", "k")
    found = Counter[tuple[int, ...]]()
    for _, role, projection in decoder.projections():
        for stage, factor in enumerate(projection.factors, 1):
            n, k = factor.shape
            found[ROLES.index(role), stage if len(projection.factors) > 1 else 0, n, k] += 1
    if different := sorted((expected - found) + (found - expected)):
        code, _, n, k = different[0]
        raise InputError(
            f"decoder: its shapes are not as predicted, such as {ROLES[code]} with n={n}, k={k}"
        )


class Executor(PairRunner):
    def __init__(self, device: Device, model: ModelRun) -> None:
        super().__init__(device, model)
        check_model(model.config)
        self.kept: dict[str, Decoder] = {}  # the last pruned decoder

    def check(self, case: Case) -> None:
        if case.pruning.model is not None:
            check_model(case.pruning.model)
        check_steps(case.steps)

    def prepare(self, case: Case) -> None:
        self.dense = self._random(self.model.config)

    def _random(self, config: Model) -> Decoder:
        return random_decoder(
            config, dtype=self.model.dtype, device=self.device.name, seed=self.model.seed
        )

    def timed(self, case: Case, end: float) -> Row:
        if case.prune not in self.kept:
            # before the next decoder is made: memory may hold two large models, not three
            self.kept.clear()
            config = case.pruning.model
            self.kept[case.prune] = (
                self._random(config) if config else prune_by_steps(self.dense, case.steps)
            )
        pruned = self.kept[case.prune]
        check_shapes(pruned, case.pruned)
        runtime = self._runtime(pruned)
        try:
            limit_s = self.limit_s(end)
            times = time_pair(self.dense, pruned, case, runtime, limit_s, self.device)
            return {"runtime": runtime, **times}
        except RuntimeError as error:
            if runtime != "cuda_graph" or is_out_of_memory(error) or "captur" not in str(error):
                raise  # all messages of failed captures have this word
            # torch's allocator may stay in capture, so nothing that this process times after it
            # counts
            raise CaptureFailed(
                f"not captured: {type(error).__name__}: {error}".splitlines()[0]
            ) from error

    def _runtime(self, pruned: Decoder) -> str:
        graph = pruned.device.startswith("cuda") and not (
            pruned.rule and pruned.rule.on_host(pruned.device)
        )
        return "cuda_graph" if graph else "eager"
