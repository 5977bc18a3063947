"""What the CPU and a CUDA GPU share as devices of torch: limits, errors the runner knows, how a loop is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibration.devices.operators import Arena, Launches
from calibration.devices.protocol import Description, Operator, OutOfMemory, Unsupported


@dataclass(frozen=True)
class Timed:
    """A ``Prepared`` whose launches ``run`` times, with torch's errors translated by its device."""

    method: str
    run: Callable[[int], float]
    translated: Callable[[], AbstractContextManager[None]]

    def sample(self, loops: int) -> float:
        """Seconds a launch."""
        with self.translated():
            return self.run(loops)


def host_loop(launches: Launches, synchronize: Callable[[], Any] = lambda: None) -> Callable[[int], float]:
    """Launches between two readings of the performance counter, each sample from the copy after the last one's on."""
    launch, copies = launches.launch, launches.copies
    following = 0

    def run(loops: int) -> float:
        nonlocal following
        first, following = following, (following + loops) % copies
        synchronize()
        start = time.perf_counter_ns()
        for i in range(first, first + loops):
            launch(i)
        synchronize()
        return (time.perf_counter_ns() - start) * 1e-9 / loops

    return run


class TorchDevice:
    """A device on which torch runs; a subclass says what it is, what it refuses, and how launches are timed."""

    name: str
    eight_bit: tuple[str, ...] = ("gemm", "copy")  # kinds of operators that torch has in fp8 and int8

    def __init__(self, place: str, cache_bytes: float, memory_limit_bytes: float) -> None:
        self.cache_bytes, self.memory_limit_bytes = cache_bytes, memory_limit_bytes
        self._arena = Arena(place, cache_bytes, 0.5 * memory_limit_bytes)

    def identity(self) -> tuple[str, Mapping[str, str]]:
        """The hardware as it names itself, and the software beside torch."""
        raise NotImplementedError

    def describe(self) -> Description:
        """Hardware, torch with its libraries, and every setting that changes timings."""
        hardware, stack = self.identity()
        known = {"torch": torch.__version__, **stack}
        return Description(self.name, hardware, known, self.memory_limit_bytes, self.cache_bytes)

    def refuses(self, operator: Operator) -> str:
        """Why it cannot run an operator; empty when it can."""
        if operator.dtype in ("fp8", "int8") and operator.kind not in self.eight_bit:
            return f"{operator.kind} in {operator.dtype} has no implementation in torch; only gemm and copy have"
        if operator.kind == "attention_block_sparse" and (operator.kv_len - operator.q_len) % operator.block:
            return f"attention_block_sparse needs kv_len - q_len to be a multiple of the block {operator.block}"
        return ""

    def prepare(self, operator: Operator) -> Timed:
        """Operands in memory; see :class:`calibration.devices.protocol.Device`."""
        if reason := self.refuses(operator):
            raise Unsupported(reason)
        if operator.footprint_bytes > self.memory_limit_bytes:
            allowed = f"{self.memory_limit_bytes:.3g} are allowed"
            raise OutOfMemory(f"{operator.key} takes {operator.footprint_bytes:.3g} bytes, {allowed}")
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
        """How launches are timed and kept cold, and a function from a number of launches to seconds a launch."""
        raise NotImplementedError

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        """Torch's error as one the runner can act on; None when it is none of these."""
        raise NotImplementedError

    def clock(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def rest(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def close(self) -> None:
        """Give operands back."""
        self._arena.clear()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
