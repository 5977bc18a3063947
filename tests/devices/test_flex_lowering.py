"""Flex attention lowered and compiled for GPUs that are not here: needs a torch built for CUDA, but no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from compiled_kernels import SHARED_KB  # noqa: E402

from calibration.devices import flex  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is not built for CUDA: it lowers for no GPU"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: operators compile for it"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels: run it alone"
    ),
    pytest.mark.filterwarnings("ignore"),  # of a driver that is not here
]


class _Lowered(Exception):
    """Ends a compilation that has its code, before the code is loaded on a device."""


def _forget() -> None:
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    torch._dynamo.reset()
    for cached in (flex.compiled, DeviceProperties.create, _triton.triton_backend, _triton.triton_hash_with_backend):
        cached.cache_clear()


@pytest.fixture
def lower(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int], int], str]]:
    """Return the code that torch's compiler makes of block-sparse attention for a compute capability and a block."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, scheduler
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    codes: list[str] = []

    def stop(graph: Any) -> None:
        codes.append(graph.codegen()[0].value)
        raise _Lowered

    def lowered(capability: tuple[int, int], edge: int) -> str:
        facts = SimpleNamespace(
            name="a GPU that is not here", major=capability[0], minor=capability[1], multi_processor_count=108,
            regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536, max_threads_per_block=1024,
            warp_size=32, gcnArchName="",
        )  # fmt: skip
        driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
        mode = FakeTensorMode()  # made before the pretence, so it does not look for a driver
        _forget()
        for owner in (torch.cuda, CudaInterface):
            monkeypatch.setattr(owner, "get_device_properties", staticmethod(lambda *_: facts))
            monkeypatch.setattr(owner, "current_device", staticmethod(lambda: 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True))
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        with mode, torch.no_grad():
            heads = (torch.empty(1, n, 10 * edge, 64, device="cuda", dtype=torch.bfloat16) for n in (12, 4, 4))
            table = torch.empty(10, 10, dtype=torch.bool, device="cuda")
            with pytest.raises(Exception, match="_Lowered"):
                flex.block_sparse(table, 10 * edge, 10 * edge, edge)(*heads)
        return codes.pop()

    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)
    monkeypatch.setattr(scheduler, "has_triton", lambda *_: True)
    with config.patch(force_disable_caches=True):
        yield lowered
    _forget()


@pytest.mark.parametrize("edge", [16, 128])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_block_sparse_attention_is_one_kernel_that_a_gpu_holds(
    capability: tuple[int, int], edge: int, lower: Any, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", lower(capability, edge), re.S)
    (name, source), number = *kernels, 10 * capability[0] + capability[1]
    assert name.startswith("triton_tem_fused")
    path = tmp_path / "kernel.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner = getattr(module, name)
    meta, (chosen,) = tuner.triton_meta, tuner.configs
    made = triton.compile(
        ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]),
        target=GPUTarget("cuda", number, 32),
        options={"num_warps": chosen.num_warps, "num_stages": chosen.num_stages},
    )
    assert made.metadata.shared <= SHARED_KB[number] * 1024
    assert len(made.asm["cubin"]) > 0
