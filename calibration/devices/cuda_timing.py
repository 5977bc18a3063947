"""Time launches on a GPU by events, under load: around replays of a captured graph, or around single launches.

Use a :class:`GpuTimer` per device. Four rules make its times those of a busy GPU:

- Before the first measurement, and after a pause, launches run for :data:`PREHEAT_S`, so clocks are steady.
- A replay is queued before the start event. On an idle GPU the event would be recorded while the host still launches.
- Readings of clocks, power and throttle reasons are taken while launches run, never between them.
- A failed capture may leave torch's allocator in capture (``CUDAGraph::capture_end`` skips its cleanup after an error
  before torch 2.12). Every later capture then fails, so a failed capture is followed by a capture of a trivial kernel,
  and :class:`CaptureFailed` is raised if that fails too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from calibration.devices.operators import Launches, is_out_of_memory
from calibration.devices.protocol import CaptureFailed, OutOfMemory, Unsupported
from calibration.devices.telemetry import Snapshot, under_load

PREHEAT_S = 0.3  # load before the first measurement and after a pause
_PAUSE_S = 0.5  # a GPU without work for longer lowers its clocks
_READ_EVERY_S = 0.05
_READING_S = 0.01  # work queued for one reading: at least the time of the reading
_FEWEST_LAUNCHES = 20  # per graph, so many launches share the gap between replays
_MOST_LAUNCHES = 1 << 13
_GRAPH_SPAN_S = 2e-3
_LONGEST_LEAD_S = 0.02  # graphs that take longer need no queued replay: the start of the first one does not count
_EVENTS = 128  # event pairs in flight without graphs
_CYCLES_PER_S = 3e9  # at least the clock of any GPU, so the device waits long enough
_LONGEST_HOLD_S = 0.01


class NotCapturable(Unsupported):
    """The operator cannot be captured in a graph; this process still can capture others."""


@dataclass(frozen=True)
class Graph:
    """A captured graph of ``length`` launches; one replay takes about ``span_s``."""

    replay: Callable[[], Any]
    length: int
    span_s: float


class GpuTimer:
    """Times launches through ``cuda`` (``torch.cuda``), with readings by ``read``.

    ``flush_bytes`` is the size of the buffer that is overwritten to empty the cache.
    """

    def __init__(self, cuda: Any, device: str, flush_bytes: float, read: Callable[[], Snapshot]) -> None:
        self._cuda, self._device, self._read, self._flush_bytes = cuda, device, read, int(flush_bytes)
        self._flush: Any = None
        self._readings: list[Snapshot] = []
        self._last_reading_s = self._last_load_s = -math.inf

    def snapshot(self) -> Snapshot:
        """Return the readings since the last call, taken under load, as one; without any, the current readings."""
        readings, self._readings, self._last_reading_s = self._readings, [], -math.inf
        return under_load(readings) if readings else self._read()

    def clear(self) -> None:
        """Free memory."""
        self._flush = None

    def preheat(self, run: Callable[[int], float]) -> None:
        """Run launches, for :data:`PREHEAT_S` if the GPU had no work for a while; one sample takes a reading."""
        start = time.monotonic()
        needed_s = PREHEAT_S if start - self._last_load_s >= _PAUSE_S else 0.0
        each = busy_s = run(1)
        while busy_s < needed_s and time.monotonic() - start < 2.0 * PREHEAT_S:
            span_s = min(_READING_S, needed_s - busy_s)
            loops = min(_MOST_LAUNCHES, math.ceil(span_s / each)) if each > 0 else _MOST_LAUNCHES
            each = run(loops)
            busy_s += each * loops

    def capture(self, launches: Launches) -> Graph:
        """Capture a graph that is long enough to hide the gap between replays, with whole rounds over the copies.

        NotCapturable: the operator cannot be captured. CaptureFailed: nothing can be captured here any more.
        """
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
        """Whether this process can capture a trivial kernel."""
        try:
            value = torch.zeros(1, device=self._device).add_(1.0)
            with self._cuda.graph(self._cuda.CUDAGraph()):
                value.add_(1.0)
            self._cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def replays(self, graph: Graph, loops: int) -> float:
        """Return the seconds per launch in enough replays for ``loops`` launches."""
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
        """Read the telemetry if the last reading is old, while queued work and, if that is short, ``more`` runs."""
        now = time.monotonic()
        if now - self._last_reading_s >= _READ_EVERY_S:
            for _ in range(min(_EVENTS, int(_READING_S / max(each_s, 1e-7)))):
                more()
            self._readings.append(self._read())
            self._last_reading_s = now

    def hold(self, launches: Launches) -> int:
        """Return the cycles that the device waits before a launch: twice the host's time for a launch."""
        took = []
        for i in range(3):
            self._cuda.synchronize()
            start = time.perf_counter()
            launches.launch(i)
            took.append(time.perf_counter() - start)
        return int(min(2.0 * min(took), _LONGEST_HOLD_S) * _CYCLES_PER_S)

    def single(self, launches: Launches, loops: int, flush: bool, hold: int = 0) -> float:
        """Return the seconds per launch of launches between two events each, after a flush of the cache if asked."""
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
