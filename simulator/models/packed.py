"""Find shape and format of a projection that a checkpoint stores in packed parts: :func:`logical`.

Only names, dtypes and shapes are used. The layouts are GPTQ and AWQ (``qweight``), compressed-tensors
(``weight_packed``, for 2:4 ``compressed`` and ``bitmask`` or ``meta``), 8-bit floats with scales, bitsandbytes
(``absmax``), ModelOpt, and MXFP4 of gpt-oss (``blocks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simulator.models.headers import Tensor

WEIGHTS = ("weight", "qweight", "weight_packed", "compressed", "blocks")
"""Names of the part that holds the weight itself; the first that exists is used."""

_SCALES = "scale scale_inv scale_2 zero_point g_idx shape global_scale format"
_OTHERS = (
    "bias qzeros scales g_idx perm bitmask row_offsets shape meta scale_packed input_scale input_global_scale "
    "input_zero_point output_scale k_scale v_scale SCB absmax quant_map nested_absmax nested_quant_map"
)
PARTS: tuple[str, ...] = (
    *WEIGHTS,
    *(f"weight_{name}" for name in _SCALES.split()),
    *_OTHERS.split(),
    r"quant_state\.bitsandbytes__\w+",
)
"""Last parts of tensor names that belong to one projection, as patterns."""

FLOATS = ("F64", "F32", "F16", "BF16")
_8_BIT = ("F8_E4M3", "F8_E5M2")
_INTS = {4: "int4", 8: "int8"}


@dataclass(frozen=True, slots=True)
class Weight:
    """Logical shape and format of a weight."""

    shape: tuple[int, ...]  # (outputs, inputs); experts in one tensor: (experts, inputs, outputs)
    dtype: str = ""  # stored format; "" for floats of 16 bits and more
    sparse24: bool = False


def logical(parts: Mapping[str, Tensor], inputs: int = 0, outputs: int = 0, bits: int = 0) -> Weight:
    """Return the weight of a projection, given its parts by the last part of their names.

    ``inputs`` and ``outputs`` are its widths, 0 if unknown, and ``bits`` the bits of packed integers: headers do not
    contain the padding of packed rows, the shape in bitsandbytes, and the bits in compressed-tensors. Raises ValueError
    for an unknown layout."""
    name = next((name for name in WEIGHTS if name in parts), "")
    if not name:
        raise ValueError("has no weight")
    stored = parts[name]
    shape, dtype = stored.shape, stored.dtype
    if name == "blocks" and len(shape) == 4:  # (experts, outputs, groups, bytes per group)
        return Weight((shape[0], shape[2] * shape[3] * 2, shape[1]), "mxfp4")
    if name == "weight" and "absmax" in parts:
        return _flat(stored.elements * 2, inputs, outputs)
    if name == "weight" and dtype in FLOATS:
        return Weight(shape)
    mask = _shape(parts, "bitmask")
    if name == "compressed" and len(mask) == 2:  # one row of bits per output, padded to bytes
        width = inputs if -(-inputs // 8) == mask[1] else mask[1] * 8
        return Weight((mask[0], width), _float(dtype), shape == (mask[0], width // 2))
    if len(shape) == 2:
        rows, columns = shape
        if name == "weight":
            return Weight((rows, 2 * columns) if dtype == "U8" else shape, _scaled(parts, dtype))
        if name == "weight_packed" and "meta" in parts:  # Marlin-24 stores half of each tile of 16 inputs
            out = _outputs(parts, "scale_packed")
            return Weight((out, rows * 32), _integer(columns * 2, out), True)
        if name == "weight_packed" and dtype == "U8":
            return Weight((rows, 2 * columns), "nvfp4" if "weight_global_scale" in parts else "mxfp4")
        if name == "weight_packed":
            width = inputs if -(-inputs * bits // 32) == columns else columns * 32 // max(bits, 1)
            return Weight((rows, width), _integer(bits, 1))
        if name == "qweight":
            return _by_scales(shape, _outputs(parts, "scales"), _shape(parts, "qzeros"), _shape(parts, "g_idx"))
    raise ValueError(f"is stored as {name} of {dtype} in {len(shape)} dimensions, an unknown layout")


def _shape(parts: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return parts[name].shape if name in parts else ()


def _outputs(parts: Mapping[str, Tensor], scales: str) -> int:
    """Return the number of outputs from scales per group of inputs and output; 0 without scales."""
    shape = _shape(parts, scales)
    return shape[1] if len(shape) == 2 else 0


def _flat(elements: int, inputs: int, outputs: int) -> Weight:
    known = inputs or outputs
    if not known or elements % known:
        raise ValueError(f"has {elements:,} elements, which do not match its known widths")
    return Weight((elements // known, known) if inputs else (known, elements // known), "int4")


def _float(dtype: str) -> str:
    if dtype in FLOATS or dtype in _8_BIT:
        return "fp8" if dtype in _8_BIT else ""
    raise ValueError(f"is stored as {dtype}, an unknown layout")


def _scaled(parts: Mapping[str, Tensor], dtype: str) -> str:
    """Return the format of a weight of 8 bits, or of 4 bits in bytes, from its scales."""
    scale = _shape(parts, "weight_scale_inv") or _shape(parts, "weight_scale")
    if dtype in _8_BIT:
        return "fp8_block" if len(scale) == 2 and scale[1] > 1 else "fp8"
    if dtype == "I8" and (scale or "SCB" in parts):
        return "int8"
    if dtype == "U8" and "weight_scale_2" in parts:
        return "nvfp4"
    return _float(dtype)


def _integer(bits: int, per: int) -> str:
    if not per or bits % per or bits // per not in _INTS:
        raise ValueError("expected integers of 4 or 8 bits, as no cost model has others")
    return _INTS[bits // per]


def _by_scales(shape: tuple[int, int], out: int, zeros: tuple[int, ...], order: tuple[int, ...]) -> Weight:
    """Return a GPTQ or AWQ weight: elements of 32 bits pack inputs (GPTQ) or outputs (AWQ)."""
    rows, columns = shape
    if not out:
        raise ValueError("has no scales for each output")
    if columns != out:
        return Weight((out, rows), _integer(32 * columns, out))
    inputs = order[0] if len(order) == 1 else 0
    bits = 32 * zeros[1] // out if len(zeros) == 2 else 4
    if inputs:
        bits = 32 * rows // inputs
    dtype = _integer(bits, 1)
    return Weight((out, inputs or rows * 32 // bits), dtype)
