"""Find the shipped profile of a GPU by its reported name, SMs, compute capability, memory and MIG mode.

A name alone is not enough: slices (MIG), laptops and slower editions have the name of a faster GPU in theirs. Names are
compared whole, and the GPU's facts must be those of the profile. A GPU without a profile is measured instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from calibration.devices.protocol import Gpu
from simulator.hardware.library import load_hardware

# name without vendor and brand -> profile with its datasheet
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "A10": "a10",
        "A100-SXM4-40GB": "a100_sxm_40gb",
        "A100-SXM-40GB": "a100_sxm_40gb",
        "A100-SXM4-80GB": "a100_sxm_80gb",
        "A100-SXM-80GB": "a100_sxm_80gb",
        "A100 80GB PCIe": "a100_pcie_80gb",
        "A100-PCIE-80GB": "a100_pcie_80gb",
        "B200": "b200_sxm",
        "GH200 480GB": "gh200",
        "GH200 120GB": "gh200",
        "H20": "h20",
        "H100 80GB HBM3": "h100_sxm",
        "H100 PCIe": "h100_pcie",
        "H200": "h200_sxm",
        "H800": "h800",
        "L4": "l4",
        "L40S": "l40s",
        "RTX 3090": "rtx_3090",
        "RTX 4090": "rtx_4090",
        "RTX 5090": "rtx_5090",
        "RTX A6000": "a6000",
        "RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000",
        "T4": "t4",
        "V100-SXM2-32GB": "v100",
    }
)

# relative difference between reported and datasheet memory: units, error correction, memory of the driver
MEMORY_TOLERANCE = 0.1

_BRANDS = re.compile(r"^(?:NVIDIA |GeForce |Tesla )*")
_SMS = re.compile(r" ?\((\d+) SM\)$")

# compute capability from which -> architecture; GPUs before Volta count as Volta
_ARCHITECTURES: tuple[tuple[tuple[int, int], str], ...] = (
    ((12, 0), "blackwell"),
    ((10, 0), "blackwell_sm100"),
    ((9, 0), "hopper"),
    ((8, 9), "ada"),
    ((8, 0), "ampere"),
    ((7, 5), "turing"),
    ((0, 0), "volta"),
)


def architecture_of(capability: tuple[int, int]) -> str:
    """Return the architecture of a compute capability."""
    return next(name for first, name in _ARCHITECTURES if capability >= first)


def shipped_name(device: str, gpu: Gpu | None = None) -> str:
    """Return the shipped profile of a GPU by the name that it reports, and its facts if they are known; "" for none.

    A name may end with the number of SMs.
    """
    counted = _SMS.search(device)
    found = NAMES.get(_BRANDS.sub("", _SMS.sub("", device.strip())), "")
    if not found:
        return ""
    hw = load_hardware(found)
    if counted and int(counted[1]) != hw.sm_count:
        return ""
    if gpu is None:
        return found
    memory = abs(gpu.memory_bytes / hw.memory_bytes - 1.0) <= MEMORY_TOLERANCE
    same = gpu.sm_count == hw.sm_count and architecture_of(gpu.capability) == hw.architecture
    return found if same and memory and not gpu.mig else ""
