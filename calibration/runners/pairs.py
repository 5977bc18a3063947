"""Time a dense and a pruned model in alternating passes: disturbances affect both, so their ratio is stable.

:func:`alternate` times two models, :class:`PairRunner` the cases of a comparison; subclasses make and prune the models
of a library. A :data:`Sampler` runs some passes and returns the seconds per pass.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.devices.protocol import CaptureFailed, Device, Unsupported
from calibration.measure.run import FAILED, SKIPPED, UNSUPPORTED
from calibration.measure.timing import OK, median_interval
from calibration.runners.cases import Case
from simulator.errors import InputError

LONGEST_S = 30.0
"""Maximum time for the pairs of one case."""
WINDOW_S = 4e-3
PRECISION = 0.005
LEAST, ENOUGH, MOST = 3, 8, 200
"""Minimum number of pairs, number after which a precise ratio ends the measurement, and maximum number."""

Sampler = Callable[[int], float]


@dataclass(frozen=True)
class PairTimes:
    """Raw samples of two models, s per pass; a pair has one of each."""

    first_s: Sequence[float]
    second_s: Sequence[float]
    loops: int  # passes per sample


def alternate(
    first: Sampler, second: Sampler, *, time_limit_s: float = 5.0, clock: Callable[[], float] = time.perf_counter
) -> PairTimes:
    """Time two models in alternation.

    The time limit applies to the pairs after a first pass of each model; at least :data:`LEAST` pairs are timed, since
    one or two do not show their scatter. The measurement ends early if the 95 % interval of the median ratio is within
    :data:`PRECISION`.
    """
    samplers = (first, second)
    once = [sample(1) for sample in samplers]  # also warms caches, selects and compiles kernels
    loops = max(1, math.ceil(WINDOW_S / max(min(once), 1e-7)))
    for sample in samplers if loops > 1 else ():
        sample(loops)
    found: tuple[list[float], list[float]] = ([], [])
    start = clock()
    for pair in range(1, MOST + 1):
        for i in (0, 1) if pair % 2 else (1, 0):
            found[i].append(samplers[i](loops))
        spent = clock() - start
        if spent >= time_limit_s and pair >= LEAST:
            break
        if pair >= ENOUGH:
            middle, low, high = median_interval([a / b for a, b in zip(*found, strict=True)])
            if high - low <= 2.0 * PRECISION * middle:
                break
    return PairTimes(*found, loops)


def looped(
    step: Callable[[], Any], synchronize: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> Sampler:
    """Return the sampler of a pass; ``synchronize`` waits for the device."""

    def sample(loops: int) -> float:
        synchronize()
        start = clock()
        for _ in range(loops):
            step()
        synchronize()
        return (clock() - start) / loops

    return sample


class Runner(ABC):
    """Run the cases of a comparison next to the dense model."""

    def __init__(self, device: Device) -> None:
        self.device = device

    @abstractmethod
    def check(self, case: Case) -> None:
        """Raise InputError if this runner cannot run the pruned model of a case; all cases are checked first."""

    @abstractmethod
    def prepare(self, case: Case) -> None:
        """Make what all cases share, such as the dense model; ``case`` is any of them."""

    @abstractmethod
    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        """Return status, reason and raw times of a case; one that cannot run gives a record with the reason.

        CaptureFailed: this process cannot time anything any more.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the cases shared."""


class PairRunner(Runner):
    """Run cases in this process, in alternation with the dense model."""

    @abstractmethod
    def timed(self, case: Case, end: float) -> tuple[PairTimes, dict[str, Any]]:
        """Time a case until ``end`` on the device's clock; return the times, and more fields of the record: at least
        the runtime ("runtime") and, if there is something to say, "reason"."""

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        """Return the record of a case; ``seconds`` include making its models."""
        try:
            times, fields = self.timed(case, self.device.clock() + seconds)
        except CaptureFailed:
            raise
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except Exception as error:  # a kernel may raise any exception; one family must not end the comparison
            from calibration.devices.operators import is_out_of_memory  # with torch, which recorded results do not need

            status = SKIPPED if is_out_of_memory(error) else FAILED
            return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        samples = {"loops": times.loops, "dense_s": times.first_s, "pruned_s": times.second_s}
        return {"status": OK, "reason": "", **fields, **samples}

    def close(self) -> None:
        """Nothing to do: models are freed with this object."""

    def limit_s(self, end: float) -> float:
        """Return the time limit of the pairs of a case that ends at ``end``: first passes take time too."""
        return min(max(0.6 * (end - self.device.clock()), 0.0), LONGEST_S)
