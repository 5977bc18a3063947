"""Find the datasheet part of a measured device's profile: from the shipped profile of the GPU, else measured quickly.

Use :func:`base_profile` before a plan is measured, and :func:`raised` with the records afterwards, so that no measured
time is faster than a measured peak. Sources of facts state whether they were measured.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from calibration.devices.protocol import Description, Device, Operator
from calibration.devices.telemetry import Reading
from calibration.fit.device_names import architecture_of, shipped_name
from calibration.measure.timing import Protocol, measure
from calibration.records.screening import work
from calibration.records.timing_table import Records
from simulator.codes import DTYPES
from simulator.errors import InputError
from simulator.files.fields import Quantity
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.schema import QUANTITIES, RATE
from simulator.operators.base import Rate

MEASURED = "measured on this device by prunesim: the best of its own GEMMs and copies"
UNKNOWN = "unknown for this device; a placeholder that no prediction uses"

_THREADS = re.compile(r"\((\d+) threads\)")
_COLD_SHARE = 1.0 / 16.0
_MARGIN = 1.05  # over the best of a few shapes: other shapes are slightly faster
_CLOCK_HZ, _POWER_W = 2.5e9, 100.0  # placeholders: headroom is 1 in both cases, and no time depends on power


def thread_notes(hw: HardwareProfile, device: str) -> list[str]:
    """Return a note if a CPU's profile was calibrated with another number of threads than a device has.

    ``device`` is the name that the device reports, or several joined names.
    """
    fitted = [s.provenance.device for s in hw.sections.values() if s.provenance and s.status == "calibrated"]
    known, found = ({int(n) for n in _THREADS.findall(text)} for text in (" ".join(fitted) or hw.title, device))
    if not known or found <= known:
        return []
    has, other = (" or ".join(map(str, sorted(numbers))) for numbers in (known, found - known))
    about = f"{hw.name} is calibrated with {has} threads, but {device} has {other}; its times do not hold there"
    return [f"{about}; use --threads {has}, or a profile that is calibrated with --threads {other}"]


def base_profile(device: Device, dtype: str, hardware: str = "") -> HardwareProfile:
    """Return the facts for measuring and fitting a device, with a rate for ``dtype``, which the device must support.

    They come from the profile ``hardware`` (a name or path; by default the shipped profile of the GPU, see
    :func:`calibration.fit.device_names.shipped_name`), or are measured in about a second.
    """
    description = device.describe()
    if dtype not in device.dtypes():
        raise InputError(
            f"--dtype {dtype}: not supported by device {device.name}; supported: {', '.join(device.dtypes())}"
        )
    known = hardware or shipped_name(description.device, description.gpu)
    if known:
        base = load_hardware(known)
        if dtype in base.rates:
            return base
        rates = {**base.rates, dtype: _gemm_rate(device, dtype)}
        return replace(base, rates=rates, sources={**base.sources, f"rates.{dtype}": MEASURED})
    return _measured_profile(device, description, dtype)


def _measured_profile(device: Device, description: Description, dtype: str) -> HardwareProfile:
    """Return the profile of a device without a datasheet, from reported facts and measured rates."""
    snapshot, gpu = device.snapshot(), description.gpu
    # an idle GPU reports a low clock and a low power: its limits count
    clock = _plausible("boost_clock", gpu.max_clock_hz if gpu else snapshot.clock_hz) or _CLOCK_HZ
    power = _plausible("power", gpu.power_limit_w if gpu else snapshot.power_w) or _POWER_W
    threads = description.stack.get("threads", "")
    processors = re.search(r"\((\d+) SM\)", description.device)
    units = int(threads) if threads.isdecimal() else int(processors[1]) if processors else 1
    reported = "reported by the operating system or driver"
    names = ("sm_count", "boost_clock", "memory", "bandwidth", "l2_cache", "power", f"rates.{dtype}")
    sources = dict.fromkeys(names, reported) | dict.fromkeys(("bandwidth", f"rates.{dtype}"), MEASURED)
    sources |= {"boost_clock": UNKNOWN} if clock == _CLOCK_HZ else {}
    sources |= {"power": UNKNOWN} if power == _POWER_W else {}
    device_name = description.device.lower()
    vendors = (name for name in ("NVIDIA", "Intel", "AMD", "Apple", "ARM") if name.lower() in device_name)
    return HardwareProfile(
        name=re.sub(r"[^a-z0-9_]+", "_", device.name.lower()).strip("_") or "device",
        title=description.device,
        vendor="NVIDIA" if gpu else next(vendors, "unknown"),
        architecture=_architecture(device, description),
        aliases=(),
        sm_count=max(gpu.sm_count if gpu else units, 1),
        boost_clock_hz=clock,
        max_clock_hz=clock,
        memory_bytes=max(float(round(description.memory_bytes)), 1e8),
        bandwidth_bytes_per_s=_within(QUANTITIES["bandwidth"][1], _MARGIN * _bandwidth(device, dtype)),
        l2_bytes=max(float(description.cache_bytes), 1e6),
        power_w=power,
        rates={dtype: _gemm_rate(device, dtype)},
        sources=sources,
        notes={"sm_count": "threads used" if threads else "multiprocessors", "memory": "limit for operands"},
    )


def _architecture(device: Device, description: Description) -> str:
    """Return the architecture whose defaults a device without a datasheet gets."""
    if description.gpu is not None:
        return architecture_of(description.gpu.capability)
    return "cpu" if device.name == "cpu" or "threads" in description.stack else "ampere"


def _within(quantity: Quantity, value: float) -> float:
    """Return a measured value within the range of its quantity in a profile."""
    return min(max(value, quantity.low), quantity.high)


def _plausible(key: str, reading: Reading) -> float:
    """Return a reading that a profile accepts, else 0."""
    quantity = QUANTITIES[key][1]
    known = isinstance(reading, float) and max(quantity.low, 1.0) < reading <= quantity.high
    return reading if known and isinstance(reading, float) else 0.0


_QUICK = Protocol(min_window_s=4e-3, precision=0.02, min_samples=5, max_samples=10, time_limit_s=0.5)


def _gemm_rate(device: Device, dtype: str) -> Rate:
    """Return the best arithmetic rate of square GEMMs of growing size, up to one that takes 50 ms, plus a margin.

    Sparse tensor cores, on a device that runs 2:4 operators, have twice the dense rate (NVIDIA, "A100 Tensor Core GPU
    Architecture", 2020).
    """
    best = 0.0
    for size in (512, 1024, 2048, 3072, 4096, 8192):
        op = Operator("gemm", dtype, m=size, n=size, k=size)
        if device.refuses(op):
            continue
        seconds = measure(device.prepare(op).sample, _QUICK, device.clock).median_s
        best = max(best, op.flops / seconds)
        if seconds > 0.05:
            break
    if not best:
        raise InputError(f"--dtype {dtype}: device {device.name} supports no square GEMM")
    dense_only = device.refuses(Operator("gemm_2to4", dtype, m=512, n=512, k=512))
    rate = _within(RATE, _MARGIN * best)
    return Rate(rate, "int32" if dtype == "int8" else "fp32", 1.0 if dense_only else 2.0)


def _bandwidth(device: Device, dtype: str) -> float:
    """Return the best memory rate, bytes/s, of a copy and of a product with one row, which only reads its weights."""
    best = 0.0
    for op in (Operator("copy", dtype, n=1 << 27), Operator("gemm", dtype, m=1, n=8192, k=4096)):
        if not device.refuses(op):
            best = max(best, op.bytes / measure(device.prepare(op).sample, _QUICK, device.clock).median_s)
    if not best:
        raise InputError(f"device {device.name}: neither a copy nor a GEMM in {dtype} could be measured")
    return best


def raised(base: HardwareProfile, records: Records) -> HardwareProfile:
    """Return the base with measured peaks raised to the rates of the records; datasheet peaks do not change."""
    timed = records.select(np.isfinite(records.seconds) & (records.seconds > 0))
    flops, weights, others = work(timed)
    gemm = timed.is_operator("gemm")
    rates: dict[str, Rate] = dict(base.rates)
    for code in np.unique(timed.dtype[gemm]):
        dtype = DTYPES[int(code)]
        if dtype in rates and base.sources.get(f"rates.{dtype}") == MEASURED:
            rows = gemm & (timed.dtype == code)
            reached = float(np.max(flops[rows] / timed.seconds[rows]))
            rates[dtype] = replace(rates[dtype], flop_per_s=_within(RATE, max(rates[dtype].flop_per_s, 1.01 * reached)))
    speed = base.bandwidth_bytes_per_s
    # smaller weights may not have been rotated past the cache
    cold = gemm & timed.cold & (weights > _COLD_SHARE * base.l2_bytes)
    if base.sources.get("bandwidth") == MEASURED and cold.any():
        fastest = float(np.max((weights + others)[cold] / timed.seconds[cold]))
        speed = _within(QUANTITIES["bandwidth"][1], max(speed, 1.01 * fastest))
    return replace(base, rates=rates, bandwidth_bytes_per_s=speed)
