"""Time launches on a GPU by events, under load: around replays of a captured graph, or around single launches.

- Before the first measurement, and after a pause, launches run for :data:`PREHEAT_S`, so clocks are steady.
- A replay is queued before the start event: an idle GPU would record the event while the host still launches.
- Clocks, power and throttle reasons are read while launches run, never between them.
- A failed capture may spoil the process: before torch 2.12 ``CUDAGraph::capture_end`` skips its cleanup after an error,
  and every later capture fails. Therefore a child process (:class:`CaptureProbe`) attempts the capture first. It also
  names the kernels, since a profiler slows later launches down. It starts in about ten seconds and answers in less than
  one; it keeps a CUDA context (about 0.5 GB) but no operands.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

import torch

from calibration.devices.operators import Launches, is_out_of_memory
from calibration.devices.protocol import CaptureFailed, Operator, OutOfMemory, Unsupported
from calibration.devices.telemetry import Snapshot, under_load

PREHEAT_S = 0.3  # load before the first measurement and after a pause
_PAUSE_S = 0.5  # a GPU lowers its clocks after a longer pause
_READ_EVERY_S = 0.05
_READING_S = 0.01  # work queued for one reading: at least the time of the reading
_FEWEST_LAUNCHES, _MOST_LAUNCHES = 20, 1 << 13  # launches per graph; they share the gap between replays
_GRAPH_SPAN_S = 2e-3
_LONGEST_LEAD_S = 0.02  # a longer graph needs no queued replay: the start of its first launch does not count
_EVENTS = 128  # event pairs in flight without graphs
_CYCLES_PER_S = 3e9  # at least the clock of any GPU, so the device waits long enough
_LONGEST_HOLD_S = 0.01
_ANSWER_LIMIT_S = 180.0  # time limit of an answer of the child, which compiles flex attention first
_MOST_KERNELS, _MOST_LETTERS = 4, 80  # of the names of kernels in a record


class NotCapturable(Unsupported):
    """The operator cannot be captured in a graph; this process can still capture other operators."""


@dataclass(frozen=True)
class Graph:
    """A captured graph of ``length`` launches; one replay takes about ``span_s``."""

    replay: Callable[[], Any]
    length: int
    span_s: float


class GpuTimer:
    """Timer of launches through ``cuda`` (``torch.cuda``), with telemetry by ``read``; a flush writes ``flush_bytes``."""

    def __init__(self, cuda: Any, device: str, flush_bytes: float, read: Callable[[], Snapshot]) -> None:
        self._cuda, self._device, self._read, self._flush_bytes = cuda, device, read, int(flush_bytes)
        self._flush: Any = None
        self._readings: list[Snapshot] = []
        self._last_reading_s = self._last_load_s = -math.inf

    def snapshot(self) -> Snapshot:
        """Return the readings under load since the last call as one; without such readings, the current ones."""
        readings, self._readings, self._last_reading_s = self._readings, [], -math.inf
        return under_load(readings) if readings else self._read()

    def clear(self) -> None:
        self._flush = None

    def preheat(self, run: Callable[[int], float]) -> None:
        """Run launches: for :data:`PREHEAT_S` if the GPU had no work for a while, else once."""
        start = time.monotonic()
        needed_s = PREHEAT_S if start - self._last_load_s >= _PAUSE_S else 0.0
        each = busy_s = run(1)
        while busy_s < needed_s and time.monotonic() - start < 2.0 * PREHEAT_S:
            span_s = min(_READING_S, needed_s - busy_s)
            loops = min(_MOST_LAUNCHES, math.ceil(span_s / each)) if each > 0 else _MOST_LAUNCHES
            each = run(loops)
            busy_s += each * loops

    def capture(self, launches: Launches) -> Graph:
        """Capture a graph of whole rounds over the copies that is long enough to hide the gap between replays."""
        once = self.single(launches, 3, flush=False)
        fewest = _FEWEST_LAUNCHES if once < _GRAPH_SPAN_S else 1
        wanted = max(fewest, min(_MOST_LAUNCHES, math.ceil(_GRAPH_SPAN_S / max(once, 1e-7))))
        length = math.ceil(wanted / launches.copies) * launches.copies
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            for i in range(min(3, length)):
                launches.launch(i)
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        try:
            # a failed capture does not restore the current stream by itself
            with self._cuda.stream(self._cuda.current_stream()), self._cuda.graph(graph):
                for i in range(length):
                    launches.launch(i)
        except Exception as error:
            first = error.__context__ or error  # the end of a failed capture raises another error
            reason = f"{type(first).__name__}: {first}".splitlines()[0]
            if not self._captures():
                raise CaptureFailed(reason) from error
            if is_out_of_memory(first):
                raise OutOfMemory(reason) from error
            raise NotCapturable(f"not capturable: {reason}") from error
        graph.replay()
        self._cuda.synchronize()
        return Graph(graph.replay, length, length * once)

    def _captures(self) -> bool:
        """Return whether a trivial kernel can be captured."""
        try:
            value = torch.zeros(1, device=self._device).add_(1.0)
            with self._cuda.graph(self._cuda.CUDAGraph()):
                value.add_(1.0)
            self._cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def replays(self, graph: Graph, loops: int) -> float:
        replays = math.ceil(loops / graph.length)
        start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
        if graph.span_s < _LONGEST_LEAD_S:
            graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        self._take_reading(graph.replay, graph.span_s)
        stop.synchronize()
        self._last_load_s = time.monotonic()
        return float(start.elapsed_time(stop)) * 1e-3 / (replays * graph.length)

    def _take_reading(self, more: Callable[[], Any], each_s: float) -> None:
        """Read the telemetry if the last reading is old, while queued work runs; ``more`` queues further work."""
        now = time.monotonic()
        if now - self._last_reading_s >= _READ_EVERY_S:
            for _ in range(min(_EVENTS, int(_READING_S / max(each_s, 1e-7)))):
                more()
            self._readings.append(self._read())
            self._last_reading_s = now

    def hold(self, launches: Launches) -> int:
        """Return the cycles that the device must wait before a launch: twice the host's time for a launch."""
        took = []
        for i in range(3):
            self._cuda.synchronize()
            start = time.perf_counter()
            launches.launch(i)
            took.append(time.perf_counter() - start)
        return int(min(2.0 * min(took), _LONGEST_HOLD_S) * _CYCLES_PER_S)

    def single(self, launches: Launches, loops: int, flush: bool, hold: int = 0) -> float:
        """Return the seconds per launch, each between two events, after a flush of the cache if ``flush``."""
        if flush and self._flush is None:
            self._flush = torch.empty(self._flush_bytes, dtype=torch.int8, device=self._device)
        total_ms, done = 0.0, 0
        while done < loops:
            pairs = []
            for i in range(done, min(loops, done + _EVENTS)):
                if flush:
                    self._flush.zero_()
                if hold:
                    self._cuda._sleep(hold)
                start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                launches.launch(i)
                stop.record()
                pairs.append((start, stop))
            if hold:
                self._take_reading(lambda: launches.launch(0), hold / _CYCLES_PER_S)
            self._cuda.synchronize()
            if hold:
                self._last_load_s = time.monotonic()
            total_ms += sum(float(start.elapsed_time(stop)) for start, stop in pairs)
            done += len(pairs)
        return total_ms * 1e-3 / loops


@dataclass(frozen=True)
class Probed:
    """Whether an operator can be captured, and the known names of its kernels."""

    captured: bool | None = None  # None: unknown, because no child can be started or the operator does not run
    reason: str = ""  # why it cannot be captured, or why none of its kind is probed
    kernels: tuple[str, ...] = ()


class CaptureProbe:
    """A child process, started by ``command``, that captures operators on one GPU: it reads an operator and writes an
    answer, one JSON line each."""

    def __init__(self, command: Sequence[str], limit_s: float = _ANSWER_LIMIT_S) -> None:
        self._command, self._limit_s = tuple(command), limit_s
        self._child: subprocess.Popen[str] | None = None
        self._usable = True

    @classmethod
    def of_gpu(cls, index: int, attention: str) -> CaptureProbe:
        child = f"from {__name__} import main; main()"
        return cls((sys.executable, "-c", child, str(index), attention))

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
        if answer["captured"] is False:  # the child has ended, because the failure may have spoiled it
            self.close()
        return Probed(answer["captured"], answer["reason"], tuple(answer["kernels"]))

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def _started(self) -> subprocess.Popen[str] | None:
        """Return the running child; None if it cannot open the GPU, as in the exclusive compute mode."""
        if self._child is None and self._usable:
            path = os.pathsep.join(filter(None, sys.path))
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # the child survives Ctrl-C, which ends a measurement between two samples
            )
            if self._line(self._child) is None:
                self._usable = False
                self.close()
        return self._child

    def _line(self, child: subprocess.Popen[str]) -> dict[str, Any] | None:
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], self._limit_s)
        line = child.stdout.readline() if ready else ""
        if line:
            return dict(json.loads(line))
        with suppress(subprocess.TimeoutExpired):
            child.wait(1.0 if ready else 0.0)
        return None


def kernel_names(launch: Callable[[], Any], synchronize: Callable[[], Any]) -> tuple[str, ...]:
    """Return the names of the kernels of a launch by torch's profiler; none if it cannot profile the GPU."""
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            launch()
            synchronize()
        names = [str(event.name) for event in seen.events() if event.device_type == DeviceType.CUDA]
    except Exception:  # CUPTI may be missing or forbidden
        return ()
    return tuple(name[:_MOST_LETTERS] for name in dict.fromkeys(names))[:_MOST_KERNELS]


def serve(device: Any, requests: Iterable[str], answers: IO[str]) -> None:
    """Answer lines with operators until they end or a capture fails."""
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        operator = Operator.from_record(json.loads(line))
        try:
            device.prepare(operator)
        except (CaptureFailed, NotCapturable) as error:
            found = Probed(False, str(error))
        except Exception:  # the measuring process will have the same error
            found = Probed()
        else:
            found = Probed(True, kernels=device.kernels(operator))
        print(json.dumps(asdict(found)), file=answers, flush=True)
        if found.captured is False:
            return
        device.close()


def main() -> None:
    """Run the child; its arguments are the number of the GPU and the attention library."""
    from calibration.devices import open_device

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    serve(open_device(f"cuda:{sys.argv[1]}", attention=sys.argv[2], probe=None), sys.stdin, answers)
