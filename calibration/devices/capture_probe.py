"""Find out in a child process whether an operator can be captured in a CUDA graph, and which kernels it launches.

A failed capture may spoil the process that attempts it (:mod:`calibration.devices.cuda_timing`), and a profiler slows
later launches down. Both happen in a child, which a :class:`CaptureProbe` starts at the first question. The start takes
about ten seconds and an answer less than one. The child keeps a CUDA context (about 0.5 GB), but no operands, until
:meth:`CaptureProbe.close`. Run as a module, this file is the child: it reads operators and writes answers, one JSON
line each.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

from calibration.devices.protocol import CaptureFailed, Operator, Unsupported

LIMIT_S = 180.0  # for an answer: flex attention is compiled first
_MOST_KERNELS, _MOST_LETTERS = 4, 80


@dataclass(frozen=True)
class Probed:
    """Whether an operator can be captured, and the names of its kernels as far as they are known."""

    captured: bool | None = None  # None: unknown, because no child can be started or the operator does not run
    reason: str = ""  # why it cannot be captured, or why none of its kind is probed
    kernels: tuple[str, ...] = ()


class CaptureProbe:
    """Answers for operators on one GPU; ``command`` is the command line of the child."""

    def __init__(self, command: Sequence[str], limit_s: float = LIMIT_S) -> None:
        self._command, self._limit_s = tuple(command), limit_s
        self._child: subprocess.Popen[str] | None = None
        self._usable = True

    @classmethod
    def of_gpu(cls, index: int, attention: str) -> CaptureProbe:
        """Return the probe of a GPU by torch's number."""
        return cls((sys.executable, "-m", __name__, str(index), attention))

    def __call__(self, operator: Operator) -> Probed:
        """Return the answer of the child; Unsupported if it crashes or gives no answer in time."""
        child = self._started()
        if child is None:
            return Probed(reason="no child process can open the GPU")
        assert child.stdin is not None
        with suppress(OSError):
            child.stdin.write(json.dumps(vars(operator)) + "\n")
            child.stdin.flush()
        answer = self._line(child)
        if answer is None:
            ended = child.poll()
            self.close()
            what = f"gave no answer within {self._limit_s:g} s" if ended is None else f"ended with status {ended}"
            raise Unsupported(f"{operator.key}: a child process that captured it {what}")
        if answer["captured"] is False:  # the child ends, because the failure may have spoiled it
            self.close()
        return Probed(answer["captured"], answer["reason"], tuple(answer["kernels"]))

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def _started(self) -> subprocess.Popen[str] | None:
        """Return the running child; None if none can open the GPU, such as in the exclusive compute mode."""
        if self._child is None and self._usable:
            path = os.pathsep.join(filter(None, sys.path))
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C ends the measurement between two samples; the child must not die first
            )
            if self._line(self._child) is None:
                self._usable = False
                self.close()
        return self._child

    def _line(self, child: subprocess.Popen[str]) -> dict[str, Any] | None:
        """Return the next line of the child; None if it ends or the time is up."""
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], self._limit_s)
        line = child.stdout.readline() if ready else ""
        if not line:
            with suppress(subprocess.TimeoutExpired):
                child.wait(1.0 if ready else 0.0)
            return None
        found: dict[str, Any] = json.loads(line)
        return found


def kernel_names(launch: Callable[[], Any], synchronize: Callable[[], Any]) -> tuple[str, ...]:
    """Return the kernels of a launch by torch's profiler; none if there is no profiler for the GPU."""
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            launch()
            synchronize()
        names = [str(event.name) for event in seen.events() if event.device_type == DeviceType.CUDA]
    except Exception:  # CUPTI may be missing or forbidden; names are not worth a failure
        return ()
    return tuple(name[:_MOST_LETTERS] for name in dict.fromkeys(names))[:_MOST_KERNELS]


def answer(device: Any, operator: Operator) -> Probed:
    """Return the answer of a device of this process."""
    from calibration.devices.cuda_timing import NotCapturable

    try:
        device.prepare(operator)
    except (CaptureFailed, NotCapturable) as error:
        return Probed(False, str(error))
    except Exception:  # the process that asks will have the same error
        return Probed()
    return Probed(True, kernels=device.kernels(operator))


def serve(device: Any, requests: Iterable[str], answers: IO[str]) -> None:
    """Answer lines with operators until they end or a capture fails."""
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        found = answer(device, Operator.from_record(json.loads(line)))
        print(json.dumps(asdict(found)), file=answers, flush=True)
        if found.captured is False:
            return
        device.close()


def main() -> None:
    """Run as the child: arguments are the number of the GPU and the attention library."""
    from calibration.devices import open_device

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    serve(open_device(f"cuda:{sys.argv[1]}", attention=sys.argv[2], probe=None), sys.stdin, answers)


if __name__ == "__main__":
    main()
