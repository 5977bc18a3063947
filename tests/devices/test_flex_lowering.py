"""Flex attention lowered by torch's compiler for GPUs that are not here: needs a torch built for CUDA, but no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from calibration.devices import flex  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is not built for CUDA: it lowers for no GPU"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: operators compile for it"),
]


class Lowered(Exception):
    """Ends a compilation that has its code, before anything is loaded on a device."""


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function from a compute capability to a list that receives the code of what is compiled for it."""
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties

    codes: list[str] = []

    def stop(graph: Any) -> None:
        codes.append(graph.codegen()[0].value)
        raise Lowered

    def prepared(capability: tuple[int, int]) -> list[str]:
        facts = SimpleNamespace(
            name="a GPU that is not here", major=capability[0], minor=capability[1], multi_processor_count=108,
            regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
            warp_size=32, shared_memory_per_block_optin=99 * 1024, gcnArchName="",
        )  # fmt: skip
        interface = device_interface.CudaInterface
        for owner in (torch.cuda, interface):
            monkeypatch.setattr(owner, "get_device_properties", staticmethod(lambda *_: facts))
            monkeypatch.setattr(owner, "current_device", staticmethod(lambda: 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(interface, "is_available", staticmethod(lambda: True))
        return codes

    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)
    monkeypatch.setattr(config, "force_disable_caches", True)
    for forget in (torch._dynamo.reset, flex.compiled.cache_clear, DeviceProperties.create.cache_clear):
        forget()
    yield prepared
    for forget in (torch._dynamo.reset, flex.compiled.cache_clear, DeviceProperties.create.cache_clear):
        forget()


# fmt: off
SHAPES = {
    "block": {"edge": 64, "length": 512},
    "small block": {"edge": 16, "length": 512},
    "default block": {"edge": 128, "length": 512},
}
# fmt: on
