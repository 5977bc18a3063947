"""How passes are launched: what a CUDA graph holds, and what is launched one by one with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from decoder_reference import CONFIG  # noqa: E402

from calibration.devices.protocol import Description  # noqa: E402
from calibration.devices.replay import ReplayDevice  # noqa: E402
from calibration.runners.decoder import timing  # noqa: E402
from calibration.runners.decoder.families import DYNAMIC, prune_decoder  # noqa: E402
from calibration.runners.decoder.model import random_decoder  # noqa: E402

pytestmark = pytest.mark.quick

NO_TRITON = ("calibration.devices.skipping.find_spec", lambda name: None)


class PlantedCuda:
    """``torch.cuda`` that captures by noting what ran while a graph was open."""

    def __init__(self, passes: list[str]) -> None:
        self.passes, self.captured, self.replays = passes, -1, 0
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream, self.synchronize = nullcontext, lambda: None
        self.CUDAGraph = lambda: SimpleNamespace(replay=self.replay)

    def replay(self) -> None:
        self.replays += 1

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        before = len(self.passes)
        yield
        self.captured = len(self.passes) - before


@pytest.mark.parametrize("family", ["", "low_rank", "token", "kv_cache"])
def test_prefill_and_decode_are_captured(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []

    def noted(name: str) -> Any:
        given = getattr(timing, name)
        return lambda *args, **options: (passes.append(name), given(*args, **options))[1]

    for name in ("prefill", "decode"):
        monkeypatch.setattr(timing, name, noted(name))
    made = random_decoder(CONFIG, dtype="fp32")
    decoder = replace(prune_decoder(made, family, 0.5) if family else made, device="cuda:0")  # its tensors are not
    for phase in ("prefill", "decode"):
        planted = PlantedCuda(passes)
        for name, value in vars(planted).items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        monkeypatch.setattr(torch.cuda, "graph", planted.graph)
        sample = timing._ready(decoder, 1, 8, phase, "cuda_graph", lambda: 0.0)
        assert (planted.captured, passes[-1]) == (1, phase)  # after warm-up, one pass
        done = len(passes)
        sample(5)
        assert (planted.replays, len(passes)) == (5, done)


def test_both_phases_are_captured_on_a_gpu_unless_the_host_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_decoder(CONFIG, dtype="fp32")
    monkeypatch.setattr("calibration.devices.skipping.find_spec", lambda name: True)
    executor = timing.Executor(ReplayDevice(description=Description("cpu", "some CPU")), CONFIG, "fp32", 0)
    for family in DYNAMIC:
        pruned = prune_decoder(made, family, 0.5)
        assert executor._runtime(pruned) == "eager"
        assert executor._runtime(replace(pruned, device="cuda:0")) == "cuda_graph"
    monkeypatch.setattr(*NO_TRITON)
    runtimes = {f: executor._runtime(replace(prune_decoder(made, f, 0.5), device="cuda:0")) for f in DYNAMIC}
    assert {f for f, runtime in runtimes.items() if runtime == "eager"} == {f for f in DYNAMIC if DYNAMIC[f].skips}
