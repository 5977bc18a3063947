"""Measure the rates that a plan needs of a device, and choose the measuring protocol."""

from __future__ import annotations

import statistics

from calibration.devices.protocol import Description, Device, Operator, OutOfMemory, Unsupported
from calibration.measure.plan import Rates, check_budget
from calibration.measure.timing import Protocol, measure

# time to compile flex attention for a GPU, s: an upper estimate from lowering and compiling it on a CPU
FLEX_COMPILE_S = 15.0


def default_protocol(description: Description, budget_s: float) -> Protocol:
    """Return the protocol for a device; a short budget gives each shape less time, to measure enough for a fit."""
    check_budget(budget_s)
    limit = min(2.0, max(0.25, budget_s / 400.0))
    return Protocol(time_limit_s=limit / default_visits(description))


def default_visits(description: Description) -> int:
    """Return the number of visits per item: CPUs are often shared with other processes, GPUs are not."""
    return 3 if description.name == "cpu" else 1


def probe(device: Device, dtype: str, protocol: Protocol | None = None) -> Rates:
    """Measure arithmetic rate, bandwidth and launch time of a device for a plan, in about one second.

    A square GEMM grows until it takes 5 ms, since a slow number format would need minutes. A copy of 64 MiB, an empty
    launch and a thin GEMM follow. The thin GEMM matters on a CPU, which rearranges weights before a product.
    """
    window_s = protocol.min_window_s if protocol else 1e-3
    quick = Protocol(window_s, precision=0.05, min_samples=6, max_samples=8, time_limit_s=0.2)
    setups: list[float] = []
    noises: list[float] = []

    def time_of(op: Operator) -> float | None:
        """Return the seconds per launch; None if the device does not support the operator or its size."""
        if device.refuses(op):
            return None
        start = device.clock()
        try:
            prepared = device.prepare(op)
        except (OutOfMemory, Unsupported):  # a library may refuse one shape
            return None
        setups.append(device.clock() - start)
        timing = measure(prepared.sample, quick, device.clock)
        noises.append(1.48 * statistics.median(abs(s / timing.median_s - 1.0) for s in timing.samples_s))
        return timing.median_s

    flop_per_s = 0.0
    for size in (256, 512, 1024, 2048, 4096):
        op = Operator("gemm", dtype, m=size, n=size, k=size)
        seconds = time_of(op)
        if seconds is not None:
            flop_per_s = max(flop_per_s, op.flops / seconds)
            if seconds > 5e-3:
                break
    if not flop_per_s:
        formats = ", ".join(device.dtypes())
        raise Unsupported(f"dtype {dtype}: device {device.name} cannot run a square GEMM; supported: {formats}")
    copy = Operator("copy", dtype, n=1 << 26)
    copied = time_of(copy)
    floor = time_of(Operator("launch_eager", dtype, cold=False)) or 5e-6
    bytes_per_s = copy.bytes / copied if copied else flop_per_s / 100.0
    thin = Operator("gemm", dtype, m=8, n=2048, k=2048)
    seconds = time_of(thin)
    if seconds is not None and seconds > 50.0 * floor:
        bytes_per_s = min(bytes_per_s, thin.bytes / max(seconds - thin.flops / flop_per_s, 0.25 * seconds))
    # the median, because the first preparation in a number format also fills memory with random data
    setup = max(1e-3, 1.5 * statistics.median(setups))
    memory_bytes = device.describe().memory_bytes or float("inf")
    compile_s = FLEX_COMPILE_S if device.name.startswith("cuda") else 0.0
    return Rates(flop_per_s, bytes_per_s, floor, setup, memory_bytes, statistics.median(noises), compile_s)
