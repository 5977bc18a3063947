"""Time a dense and a pruned model in alternating passes: disturbances affect both times, so the ratio is stable."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from calibration.devices.protocol import CaptureFailed, Device, Unsupported
from calibration.measure.run import FAILED, SKIPPED, UNSUPPORTED
from calibration.measure.timing import OK, median_interval
from calibration.runners.cases import Case
from simulator.errors import InputError
from simulator.models.config import ModelConfig

LONGEST_S = 30.0  # longest time of the pairs of one case
WINDOW_S = 4e-3
PRECISION = 0.005  # half-width of the 95 % interval of the median ratio
LEAST, ENOUGH, MOST = 3, 8, 200  # pairs that show scatter; pairs that suffice if their ratio is precise; most pairs

T = TypeVar("T")
Sampler = Callable[[int], float]  # runs some passes and returns the seconds per pass


def alternate(dense: Sampler, pruned: Sampler, limit_s: float) -> dict[str, Any]:
    """Return the raw times of a record by :func:`in_turns`, after untimed passes that warm caches and compile kernels;
    "loops": passes per sample."""
    samplers = (dense, pruned)
    once = [sample(1) for sample in samplers]
    loops = max(1, math.ceil(WINDOW_S / max(min(once), 1e-7)))
    for sample in samplers if loops > 1 else ():
        sample(loops)
    found = in_turns(lambda i: [samplers[i](loops)], list, limit_s, time.perf_counter)
    dense_s, pruned_s = ([one for (one,) in samples] for samples in found)
    return {"loops": loops, "dense_s": dense_s, "pruned_s": pruned_s}


def in_turns(
    sample: Callable[[int], T],
    seconds: Callable[[T], Sequence[float]],
    limit_s: float,
    clock: Callable[[], float],
    most: int = MOST,
) -> tuple[list[T], list[T]]:
    """Return samples of the models 0 and 1 in alternation, until their ratio is precise or the time is over."""
    found: tuple[list[T], list[T]] = ([], [])
    start = clock()
    for pair in range(1, most + 1):
        for i in (0, 1) if pair % 2 else (1, 0):
            found[i].append(sample(i))
        spent = clock() - start
        if spent >= limit_s and pair >= LEAST:
            break
        if pair >= ENOUGH:
            ratios = [a / b for x, y in zip(*found) for a, b in zip(seconds(x), seconds(y))]
            middle, low, high = median_interval(ratios)
            if high - low <= 2.0 * PRECISION * middle:
                break
    return found


def looped(step: Callable[[], Any], synchronize: Callable[[], Any]) -> Sampler:
    def sample(loops: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(loops):
            step()
        synchronize()
        return (time.perf_counter() - start) / loops

    return sample


@dataclass(frozen=True)
class ModelRun:
    """A dense model, and how this model and its pruned versions run."""

    config: ModelConfig
    dtype: str = "bf16"
    engine: str = "reference"  # a key of :data:`calibration.runners.compare.ENGINES`
    content: Mapping[str, Any] = field(default_factory=dict)  # the model's config.json, for engines of a library
    python: str = sys.executable  # interpreter that has vLLM
    seed: int = 0  # determines weights and the order of the cases


class Runner:
    def __init__(self, device: Device, model: ModelRun) -> None:
        self.device, self.model = device, model

    def check(self, case: Case) -> None:
        """Raise InputError if this runner cannot run the pruned model of a case; all cases are checked first."""

    def prepare(self, case: Case) -> None:
        """Make the dense model, which all cases share; ``case`` is any of them."""

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        """Return status, reason and raw times of a case; CaptureFailed: this process can time nothing any more."""
        raise NotImplementedError

    def close(self) -> None: ...


class PairRunner(Runner):
    def timed(self, case: Case, end: float) -> dict[str, Any]:
        """Time a case until ``end`` on the device's clock; return the fields of the record."""
        raise NotImplementedError

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        try:
            return {"status": OK, "reason": "", **self.timed(case, self.device.clock() + seconds)}
        except CaptureFailed:
            raise
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except Exception as error:  # a kernel may raise any exception; one family must not end the comparison
            from calibration.devices.operators import is_out_of_memory  # imports torch, which recorded runs do not need

            status = SKIPPED if is_out_of_memory(error) else FAILED
            return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}

    def limit_s(self, end: float) -> float:
        """Return the time limit of the pairs of a case that ends at ``end``; first passes get the rest."""
        return min(max(0.6 * (end - self.device.clock()), 0.0), LONGEST_S)
