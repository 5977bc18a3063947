"""Time and memory of a simulated schedule as requests grow from 100 to 100,000."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import pytest

from simulator import Request, load_hardware
from simulator.serving.arrivals import Lengths, Traffic
from simulator.serving.schedule import simulate
from simulator.serving.server import Server
from simulator.serving.steps import step_tables

LENGTHS = {"prompt": Lengths(215, 1.0, 4, 1024), "output": Lengths(200, 0.8)}
LOADS = {"at once": {}, "rate": {"rate": 30.0}, "clients": {"concurrency": 64}}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("requests", [100, 1_000, 10_000, 100_000])
@pytest.mark.parametrize("load", LOADS)
def test_requests(
    engine: str, requests: int, load: str, floor: Callable[[str, float, float, bool], None]
) -> None:
    """One model at one quantile, its table included: 10,000 requests in 5 s and 300 MB."""
    hw = load_hardware("h100")
    drawn = Traffic(**LENGTHS, requests=requests, most_total=2048, **LOADS[load]).draw()
    server, request = Server.of(engine, hw), Request(model="llama-3.1-8b", engine=engine)
    step_tables(request, hw, server, 2048, requests)  # reads files
    begin = time.process_time()
    times = step_tables(request, hw, server, 2048, requests).at()
    served = simulate(drawn, times, server)
    seconds = time.process_time() - begin
    tracemalloc.start()
    simulate(drawn, times, server)
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert len(served.end) == requests
    what = f"{requests:,} requests {load} in {engine}"
    floor(f"s of {what}", seconds, 5.0 * max(requests / 10_000, 0.2), False)
    floor(f"MB of {what}", megabytes, 300.0 * max(requests / 10_000, 0.2), False)
