"""Common parts of the CPU and CUDA devices in torch: limits, translation of errors, timing of a loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibration.devices.operators import Arena, Launches
from calibration.devices.protocol import Description, Operator, OutOfMemory, Unsupported
from calibration.devices.skipping import triton_needs


@dataclass(frozen=True)
class Timed:
    """A ``Prepared`` whose launches are timed by ``run``; its device translates torch's errors."""

    method: str
    run: Callable[[int], float]
    translated: Callable[[], AbstractContextManager[None]]

    def sample(self, loops: int) -> float:
        """Return the seconds per launch."""
        with self.translated():
            return self.run(loops)


def host_loop(launches: Launches, synchronize: Callable[[], Any] = lambda: None) -> Callable[[int], float]:
    """Return a function that times launches with the performance counter; each sample starts at the next copy."""
    launch, copies = launches.launch, launches.copies
    following = 0

    def run(loops: int) -> float:
        nonlocal following
        first = following
        following = (first + loops) % copies
        synchronize()
        start = time.perf_counter_ns()
        for i in range(first, first + loops):
            launch(i)
        synchronize()
        return (time.perf_counter_ns() - start) * 1e-9 / loops

    return run


class TorchDevice:
    """A device of torch; subclasses define its identity, unsupported operators and the timing of launches."""

    name: str
    rotation = 2.0  # multiple of the last-level cache that a round over rotated operands exceeds
    eight_bit: tuple[str, ...] = ("gemm", "copy")  # kinds of operators that torch supports in fp8 and int8

    def __init__(self, device: str, cache_bytes: float, memory_limit_bytes: float) -> None:
        self.cache_bytes, self.memory_limit_bytes = cache_bytes, memory_limit_bytes
        self._arena = Arena(device, cache_bytes, 0.5 * memory_limit_bytes, self.rotation)

    def identity(self) -> tuple[str, Mapping[str, str]]:
        """Return the hardware as it names itself, and the software except torch."""
        raise NotImplementedError

    def describe(self) -> Description:
        """Return hardware, torch with its libraries, and every setting that changes times."""
        hardware, stack = self.identity()
        return Description(
            name=self.name,
            device=hardware,
            stack={"torch": torch.__version__, **stack},
            memory_bytes=self.memory_limit_bytes,
            cache_bytes=self.cache_bytes,
        )

    def refuses(self, operator: Operator) -> str:
        """Return the reason why it cannot run an operator, or ""."""
        if operator.dtype in ("fp8", "int8") and operator.kind not in self.eight_bit:
            return f"{operator.kind} in {operator.dtype} is not implemented in torch; only gemm and copy are"
        if operator.kind == "attention_block_sparse" and (operator.kv_len - operator.q_len) % operator.block:
            return f"attention_block_sparse needs kv_len - q_len to be a multiple of the block {operator.block}"
        on_gpu = self.name.startswith("cuda")
        if operator.kind == "attention_block_sparse" and on_gpu and (needs := triton_needs()):
            return f"attention_block_sparse: flex attention needs {needs}"
        return ""

    def prepare(self, operator: Operator) -> Timed:
        """Make operands; see :class:`calibration.devices.protocol.Device`."""
        if reason := self.refuses(operator):
            raise Unsupported(reason)
        if operator.footprint_bytes > self.memory_limit_bytes:
            limit = f"limit {self.memory_limit_bytes:.3g}"
            raise OutOfMemory(f"{operator.key} takes {operator.footprint_bytes:.3g} bytes, {limit}")
        with self._translated(operator):
            return Timed(*self._bind(operator), lambda: self._translated(operator))

    @contextmanager
    def _translated(self, operator: Operator) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            known = self._translate(error, operator)
            if known is None:
                raise
            raise known from error

    def _bind(self, operator: Operator) -> tuple[str, Callable[[int], float]]:
        """Return the timing method, and a function from a number of launches to seconds per launch."""
        raise NotImplementedError

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        """Return torch's error as an error that the runner handles, or None."""
        raise NotImplementedError

    def clock(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def rest(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def close(self) -> None:
        """Free operands."""
        self._arena.clear()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
