"""Install a planted GPU as the CUDA device of this process, so that whole commands run on it.

Within :func:`installed`, tensors on ``cuda`` have shapes and no data (torch's device ``meta``),
each call of torch on them is a kernel of planted duration, and the clocks of this process are those
of the planted host. Commands run unchanged, and a GEMM of any size costs microseconds of real time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fakes.interpreted  # noqa: F401 - before Triton
import pytest
import torch
from fakes.gpu import GPUS, NO_TROUBLES, REFUSED, Gpu, Kernel, PlantedCuda, Troubles, planted_nvml
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from calibration.devices import attention, operators
from calibration.devices import cuda as cuda_device
from calibration.devices.operators import Launches
from calibration.devices.protocol import Operator

ATTENTION = 0.6
"""Arithmetic rate of attention relative to that of GEMMs."""
PRODUCTS = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "__matmul__",
    "__rmatmul__",
    "_scaled_mm",
    "_int_mm",
)
LOOKUPS = ("embedding", "index_select", "__getitem__", "gather")
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided")
FREE = {
    "view",
    "t",
    "transpose",
    "unflatten",
    "chunk",
    "expand",
    "unsqueeze",
    "size",
    "numel",
    "dim",
    "__len__",
}
"""Calls without a kernel, which are most calls."""
FACTORS = {torch.float8_e4m3fn: 2.0, torch.int8: 2.0, torch.float32: 0.125}
"""Rates of number formats relative to bf16."""


class Kernels(TorchFunctionMode):
    """Turn calls of torch for ``cuda`` into planted kernels on tensors without data."""

    def __init__(self, cuda: PlantedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "__get__":
            return self._attribute(func, args)
        if name in FREE:
            return func(*args, **kwargs)
        if any(_is_cuda(x) for x in (*args, *kwargs.values())):
            args = tuple("meta" if _is_cuda(x) else x for x in args)
            kwargs = {
                key: "meta" if _is_cuda(x) else x for key, x in kwargs.items() if key != "generator"
            }
        given = [*_tensors((args, kwargs))]
        if name == "scaled_dot_product_attention":
            out = args[0].new_empty((*args[0].shape[:-1], args[2].shape[-1]))
        else:
            out = func(*args, **kwargs)
        made = [t for t in _tensors(out) if t.is_meta]
        if made or (name == "__setitem__" and args[0].is_meta):
            self._launch(name, args, kwargs, given, made)
        return out

    def _attribute(self, func: Any, args: Any) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute in ("device", "is_cuda") and args[0].is_meta:
            return torch.device("cuda:0") if attribute == "device" else True
        return func(*args)

    def _launch(self, name: str, args: Any, kwargs: Any, given: list[Any], made: list[Any]) -> None:
        self.cuda.alive()
        new = sum(t.nbytes for t in made)
        if new > min(self.cuda.troubles.memory_bytes, self.cuda.gpu.memory_bytes) and not _aliases(
            made, given
        ):
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {new / 2**30:.2f} GiB."
            )
        changes = name.endswith("_") and not name.endswith("__")
        if name in ALLOCATIONS or (_aliases(made, given) and not changes and name != "__setitem__"):
            return
        troubles, gpu = self.cuda.troubles, self.cuda.gpu
        product, attends = name in PRODUCTS, name == "scaled_dot_product_attention"
        if product and tuple(args[1].shape[-2:]) in (troubles.refused, troubles.refused[::-1]):
            raise RuntimeError(REFUSED)
        moved = sum(t.nbytes for t in {id(t): t for t in given}.values()) + new
        if name in LOOKUPS:
            moved = 2 * new
        elif name == "__setitem__":
            moved = 2 * next((t.nbytes for t in _tensors(args[2:])), 0)
        flops = 2.0 * sum(t.numel() for t in made) * args[0].shape[-1] if product else 0.0
        if attends:
            flops = (
                4.0
                * args[0].numel()
                * args[1].shape[-2]
                * (0.5 if _causal(args, kwargs) else 1.0)
                / ATTENTION
            )
        rate = gpu.flop_per_s * FACTORS.get(given[0].dtype, 1.0) if flops else 1.0
        share = ATTENTION if attends else 1.0
        self.cuda.submit({Kernel(name, flops / rate, moved / gpu.bytes_per_s, share): 1})


def _causal(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("is_causal")) or type(kwargs.get("attn_mask")).__name__ == "CausalBias"


def _is_cuda(value: Any) -> bool:
    return str(value).startswith("cuda") if isinstance(value, str | torch.device) else False


def _tensors(value: Any) -> Iterator[Any]:
    """Yield the tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _aliases(made: list[Any], given: list[Any]) -> bool:
    """Whether results share the memory of arguments: views and in-place calls."""
    return bool(made) and made[0].untyped_storage()._cdata in {
        t.untyped_storage()._cdata for t in given
    }


class Generator(torch.Generator):
    """A generator for any device; planted tensors have no data."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, device="cpu")


SETUP_S = 0.01
"""Host time to make the operands of an operator."""
SKIPPING = ("_columns", "_features")
"""Kernels of Triton that multiply matrices."""
BY_SHAPE = ("gather_gemm", "grouped_gemm", "attention_block_sparse")
"""Operators whose kernels (Triton, flex attention) need a GPU; their durations follow from their
shapes."""


def planted_build(cuda: PlantedCuda) -> Callable[..., Launches]:
    """Return ``operators.build`` for a planted GPU: an operator runs in torch once."""

    def build(op: Operator, *place: Any) -> Launches:
        if op.kind in BY_SHAPE:
            work = Kernel(op.kind, op.flops / cuda.gpu.flop_per_s, op.bytes / cuda.gpu.bytes_per_s)
            return Launches(lambda i: cuda.submit({work: 1}), 1, ", planted by its shape")
        cuda.rest(SETUP_S)
        launches = operators.build(op, *place)
        calls: list[Mapping[Kernel, int]] = []

        def launch(i: int) -> None:
            if calls:
                for kernels in calls:
                    cuda.submit(kernels)
                return
            with cuda.watched() as found:
                launches.launch(i)
            calls.extend(found)

        return Launches(launch, launches.copies, launches.how)

    return build


@contextmanager
def installed(gpu: Gpu | str, troubles: Troubles = NO_TROUBLES) -> Iterator[PlantedCuda]:
    """Run a block with a planted GPU as the CUDA device of this process, in its simulated time."""
    cuda = PlantedCuda(GPUS[gpu] if isinstance(gpu, str) else gpu, troubles)
    with pytest.MonkeyPatch.context() as patch, Kernels(cuda):
        for name in (*vars(PlantedCuda), *vars(cuda)):
            if hasattr(torch.cuda, name) and not name.startswith("__"):
                patch.setattr(torch.cuda, name, getattr(cuda, name))
        patch.setattr(torch.version, "cuda", "12.8")
        patch.setattr(torch, "Generator", Generator)
        patch.setitem(sys.modules, "pynvml", planted_nvml(cuda) if troubles.nvml else None)
        patch.setattr(cuda_device, "build", planted_build(cuda))
        patch.setattr(attention, "_attend", _attend)
        # as Triton was imported in this process
        for launched in (JITFunction, InterpretedFunction):
            patch.setattr(launched, "run", planted_triton(cuda))
        patch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
        patch.setattr(torch.backends.cusparselt, "version", lambda: 702)
        patch.setattr(operators, "_fastest", lambda packed, dense, bias: (0,))
        patch.setattr(
            torch,
            "_cslt_compress",
            lambda weight: weight.new_empty(len(weight), weight.shape[1] * 9 // 16),
        )
        patch.setattr(torch, "_cslt_sparse_mm", planted_sparse(cuda))
        patch.setattr(time, "monotonic", cuda.read)
        patch.setattr(time, "perf_counter", cuda.read)
        patch.setattr(time, "perf_counter_ns", lambda: round(cuda.read() * 1e9))
        patch.setattr(time, "sleep", cuda.rest)
        yield cuda


def planted_triton(cuda: PlantedCuda) -> Callable[..., None]:
    """Return the launch of a Triton kernel: all of its products, without skips, and each tensor
    once."""

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        given = {id(t): t for t in _tensors(args)}.values()
        matrices = [t for t in given if t.dim() == 2 and t.is_floating_point()]
        products = kernel.__name__ in SKIPPING and len(matrices) >= 2
        flops = 2.0 * matrices[0].shape[0] * matrices[1].numel() if products else 0.0
        moved = sum(t.nbytes for t in given)
        cuda.submit(
            {Kernel(kernel.__name__, flops / cuda.gpu.flop_per_s, moved / cuda.gpu.bytes_per_s): 1}
        )

    return run


def planted_sparse(cuda: PlantedCuda) -> Callable[..., Any]:
    """Return the product of a 2:4 sparse weight (n, k) and activations (k, m), twice as fast as a
    dense one."""

    def multiply(packed: Any, dense: Any, *_: Any) -> Any:
        out = dense.new_empty(dense.shape[1], len(packed))
        work_s = out.numel() * dense.shape[0] / cuda.gpu.flop_per_s
        moved = packed.nbytes + dense.nbytes + out.nbytes
        cuda.submit({Kernel("sparse", work_s, moved / cuda.gpu.bytes_per_s): 1})
        return out

    return multiply


def _attend(q: Any, k: Any, v: Any, mask: Any, dynamic: bool = True, **options: Any) -> Any:
    """Attend in a planted kernel in place of flex attention, which needs a GPU."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
