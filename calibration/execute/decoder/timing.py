"""TTFT and TPOT of a decoder, by the same protocol that times operators."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from calibration.devices.protocol import Unsupported
from calibration.execute.decoder.model import Decoder
from calibration.execute.decoder.run import decode, prefill
from calibration.measure.timing import Protocol, Timing, measure
from simulator.errors import unknown

PHASES: tuple[str, ...] = ("prefill", "decode")


def time_decoder(
    decoder: Decoder,
    *,
    batch: int,
    seq: int,
    phases: Sequence[str] = PHASES,
    protocol: Protocol | None = None,
    runtime: str = "eager",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time to first token (``"prefill"``) and time per output token (``"decode"``).

    On a CPU open its device (``open_device("cpu")``) for as long as decoders are timed: it pins the threads and keeps the allocator from
    giving memory back, as it does for the operators that predictions are made of.

    Parameters
    ----------
    decoder : Decoder
    batch, seq : int
        Sequences; prompt tokens each (cached positions at the decode step that is timed).
    phases : sequence of {"prefill", "decode"}
    protocol : calibration.measure.timing.Protocol, optional
    runtime : {"eager", "cuda_graph"}
        How decode steps are launched; a graph needs a CUDA GPU and a decoder whose kernels do not depend on its data.
    clock : callable
        Seconds; an argument for the sake of tests.

    Returns
    -------
    dict of str to Timing
        Seconds a forward pass. Prefill leaves out drawing the next token, decode repeats one step at the same position.
    """
    for phase in phases:
        if phase not in PHASES:
            raise unknown("phase", phase, PHASES)
    if runtime not in ("eager", "cuda_graph"):
        raise unknown("runtime", runtime, ("eager", "cuda_graph"))
    cuda = decoder.place.startswith("cuda")
    if runtime == "cuda_graph" and not cuda:
        raise Unsupported(f"cuda_graph: device {decoder.place!r} has no CUDA graphs")
    if runtime == "cuda_graph" and decoder.dynamic.family in ("dynamic_depth", "dynamic_width"):
        raise Unsupported(
            f"cuda_graph: {decoder.dynamic.family} decides on the host which kernels run, so no graph can hold it"
        )
    protocol = protocol or Protocol(time_limit_s=10.0, min_samples=6)
    tokens = torch.randint(decoder.config.vocab, (batch, seq), generator=torch.Generator().manual_seed(0)).to(
        decoder.place
    )
    out: dict[str, Timing] = {}
    for phase in phases:
        step = _prefill_step(decoder, tokens) if phase == "prefill" else _decode_step(decoder, tokens)
        if phase == "decode" and runtime == "cuda_graph":
            step = _recorded(step)
        out[phase] = measure(
            _sampler(step, cuda, clock), replace(protocol, warm_values=min(protocol.warm_values, 4)), clock
        )
    return out


def _prefill_step(decoder: Decoder, tokens: Any) -> Callable[[], Any]:
    return lambda: prefill(decoder, tokens)


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


def _sampler(step: Callable[[], Any], cuda: bool, clock: Callable[[], float]) -> Callable[[int], float]:
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
