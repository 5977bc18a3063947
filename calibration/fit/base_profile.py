"""Find the datasheet part of a measured device's profile: the shipped profile of the GPU, else
facts measured quickly before a plan; :func:`raised` then keeps measured peaks above all measured
rates. Slices (MIG), laptops and slower editions have names that contain the name of a faster GPU:
whole names are compared, and the other facts must agree."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from calibration.devices.protocol import Description, Device, Gpu, Operator
from calibration.devices.telemetry import Reading
from calibration.measure.timing import Protocol, measure
from calibration.records.screening import work
from calibration.records.timing_table import Records
from simulator.codes import DTYPES
from simulator.errors import InputError
from simulator.files.fields import Quantity
from simulator.hardware.library import load_hardware, shipped_names
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.schema import QUANTITIES, RATE, plain_name
from simulator.operators.base import Rate

MEASURED = "measured on this device by prunesim: the best of its own GEMMs and copies"
UNKNOWN = "unknown for this device; a placeholder, which only energies depend on"
HIGHEST = "a tenth above the highest power that prunesim measured on this device"

_THREADS = re.compile(r"\((\d+) threads\)")
_COLD_SHARE = 1.0 / 16.0  # share of L2 from which rotated weights certainly come from memory
_MARGIN = 1.05  # factor on the best of a few shapes: other shapes are slightly faster
# placeholders: headroom is 1 in both cases, and no time depends on power
_CLOCK_HZ, _POWER_W = 2.5e9, 100.0
_QUICK = Protocol(
    min_window_s=4e-3, precision=0.02, min_samples=5, max_samples=10, time_limit_s=0.5
)

_BRANDS, _SMS = re.compile(r"^(?:nvidia_|geforce_|tesla_)*"), re.compile(r" ?\((\d+) SM\)$")
_MEMORY_TOLERANCE = 0.1  # relative: units, error correction, memory of the driver
_ARCHITECTURES = (  # first compute capability, architecture; GPUs before Volta count as Volta
    ((12, 0), "blackwell"),
    ((10, 0), "blackwell_sm100"),
    ((9, 0), "hopper"),
    ((8, 9), "ada"),
    ((8, 0), "ampere"),
    ((7, 5), "turing"),
    ((0, 0), "volta"),
)


def architecture_of(capability: tuple[int, int]) -> str:
    return next(name for first, name in _ARCHITECTURES if capability >= first)


def device_names() -> dict[str, str]:
    """Return the names that NVIDIA's driver prints, without vendor and brand -> profile: aliases
    with "nvidia_"."""
    own = ((plain, name) for plain, name in shipped_names().items() if plain.startswith("nvidia_"))
    return {_without_brand(plain): name for plain, name in own}


def _without_brand(device: str) -> str:
    return _BRANDS.sub("", plain_name(device))


def shipped_name(device: str, gpu: Gpu | None = None) -> str:
    """Return the shipped profile of a GPU by its reported name (and number of SMs) and its known
    facts, or ""."""
    counted = _SMS.search(device)
    found = device_names().get(_without_brand(_SMS.sub("", device.strip())), "")
    if not found:
        return ""
    hw = load_hardware(found)
    same = counted is None or int(counted[1]) == hw.sm_count
    if gpu is not None:
        same &= (
            gpu.sm_count == hw.sm_count
            and architecture_of(gpu.capability) == hw.architecture
            and not gpu.mig
        )
        same &= abs(gpu.memory_bytes / hw.memory_bytes - 1.0) <= _MEMORY_TOLERANCE
    return found if same else ""


def thread_notes(hw: HardwareProfile, device: str) -> list[str]:
    fitted = [
        s.provenance.device
        for s in hw.sections.values()
        if s.provenance and s.status == "calibrated"
    ]
    known, found = (
        {int(n) for n in _THREADS.findall(text)} for text in (" ".join(fitted) or hw.title, device)
    )
    if not known or found <= known:
        return []
    has, other = (" or ".join(map(str, sorted(numbers))) for numbers in (known, found - known))
    about = (
        f"{hw.name} is calibrated with {has} threads, but {device} has {other}; its times do not"
        " hold there"
    )
    return [f"{about}; use --threads {has}, or a profile that is calibrated with --threads {other}"]


def base_profile(device: Device, dtype: str, hardware: str = "") -> HardwareProfile:
    """Return the facts of ``hardware`` (default: the shipped profile of the GPU), else measured
    ones, with a rate for ``dtype``."""
    description = device.describe()
    if dtype not in device.dtypes():
        known = ", ".join(device.dtypes())
        raise InputError(
            f"--dtype {dtype}: not supported by device {device.name}; supported: {known}"
        )
    if name := hardware or shipped_name(description.device, description.gpu):
        base = load_hardware(name)
        if dtype in base.rates:
            return base
        rates = {**base.rates, dtype: _gemm_rate(device, dtype)}
        return replace(base, rates=rates, sources={**base.sources, f"rates.{dtype}": MEASURED})
    return _measured_profile(device, description, dtype)


def _measured_profile(device: Device, description: Description, dtype: str) -> HardwareProfile:
    snapshot, gpu = device.snapshot(), description.gpu
    # an idle GPU reports a low clock and a low power: its limits count
    clock = _plausible("boost_clock", gpu.max_clock_hz if gpu else snapshot.clock_hz) or _CLOCK_HZ
    power = _plausible("power", gpu.power_limit_w if gpu else snapshot.power_w) or _POWER_W
    threads = description.stack.get("threads", "")
    processors = re.search(r"\((\d+) SM\)", description.device)
    units = int(threads) if threads.isdecimal() else int(processors[1]) if processors else 1
    reported = "reported by the operating system or driver"
    names = (
        "sm_count",
        "boost_clock",
        "memory",
        "bandwidth",
        "l2_cache",
        "power",
        f"rates.{dtype}",
    )
    sources = dict.fromkeys(names, reported) | {"bandwidth": MEASURED, f"rates.{dtype}": MEASURED}
    if clock == _CLOCK_HZ:
        sources["boost_clock"] = UNKNOWN
    if power == _POWER_W:
        sources["power"] = UNKNOWN
    vendors = ("NVIDIA", "Intel", "AMD", "Apple", "ARM")
    vendor = next(
        (name for name in vendors if name.lower() in description.device.lower()), "unknown"
    )
    architecture = "cpu" if device.name == "cpu" or threads else "ampere"
    return HardwareProfile(
        name=re.sub(r"[^a-z0-9_]+", "_", device.name.lower()).strip("_") or "device",
        title=description.device,
        vendor="NVIDIA" if gpu else vendor,
        architecture=architecture_of(gpu.capability) if gpu else architecture,
        aliases=(),
        sm_count=max(gpu.sm_count if gpu else units, 1),
        boost_clock_hz=clock,
        max_clock_hz=clock,
        memory_bytes=max(float(round(description.memory_bytes)), 1e8),
        bandwidth_bytes_per_s=_within(
            QUANTITIES["bandwidth"][1], _MARGIN * _bandwidth(device, dtype)
        ),
        l2_bytes=max(float(description.cache_bytes), 1e6),
        power_w=power,
        rates={dtype: _gemm_rate(device, dtype)},
        sources=sources,
        notes={
            "sm_count": "threads used" if threads else "multiprocessors",
            "memory": "limit for operands",
        },
    )


def _within(quantity: Quantity, value: float) -> float:
    return min(max(value, quantity.low), quantity.high)


def _plausible(key: str, reading: Reading) -> float:
    quantity = QUANTITIES[key][1]
    return (
        reading
        if isinstance(reading, float) and max(quantity.low, 1.0) < reading <= quantity.high
        else 0.0
    )


def _gemm_rate(device: Device, dtype: str) -> Rate:
    """Return the best arithmetic rate of square GEMMs up to one that takes 50 ms, plus a margin.
    Sparse tensor cores have twice the dense rate (NVIDIA, "A100 Tensor Core GPU Architecture",
    2020)."""
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
    """Return the better rate, bytes/s, of a copy and of a product of one row, which mostly reads
    weights."""
    best = 0.0
    for op in (Operator("copy", dtype, n=1 << 27), Operator("gemm", dtype, m=1, n=8192, k=4096)):
        if not device.refuses(op):
            best = max(
                best, op.bytes / measure(device.prepare(op).sample, _QUICK, device.clock).median_s
            )
    if not best:
        raise InputError(
            f"device {device.name}: neither a copy nor a GEMM in {dtype} could be measured"
        )
    return best


def raised(base: HardwareProfile, records: Records) -> HardwareProfile:
    """Return the base with measured peaks raised to the rates of the fastest records, and an
    unknown power limit above all measured powers; datasheet facts do not change. Attention counts:
    without instructions for a format, it can be faster than every GEMM."""
    timed = records.select(np.isfinite(records.seconds) & (records.seconds > 0))
    flops, weights, others = work(timed)
    gemm = timed.is_operator("gemm")
    rates: dict[str, Rate] = dict(base.rates)
    products = gemm | timed.is_operator("attention_prefill", "attention_decode")
    for code in np.unique(timed.dtype[products]):
        dtype = DTYPES[int(code)]
        if dtype in rates and base.sources.get(f"rates.{dtype}") == MEASURED:
            reached = float(np.max((flops / timed.seconds)[products & (timed.dtype == code)]))
            rates[dtype] = replace(
                rates[dtype], flop_per_s=_within(RATE, max(rates[dtype].flop_per_s, 1.01 * reached))
            )
    speed = base.bandwidth_bytes_per_s
    cold = gemm & timed.cold & (weights > _COLD_SHARE * base.l2_bytes)
    if base.sources.get("bandwidth") == MEASURED and cold.any():
        fastest = float(np.max((weights + others)[cold] / timed.seconds[cold]))
        speed = _within(QUANTITIES["bandwidth"][1], max(speed, 1.01 * fastest))
    power, sources = base.power_w, base.sources
    if sources.get("power") == UNKNOWN and records.watts.any():
        power, sources = 1.1 * float(records.watts.max()), {**sources, "power": HIGHEST}
    return replace(base, rates=rates, bandwidth_bytes_per_s=speed, power_w=power, sources=sources)
