"""What shape and format a projection has of which a checkpoint stores packed parts: :func:`logical`.

Told by names, dtypes and shapes alone. The layouts: GPTQ and AWQ (``qweight``), compressed-tensors (``weight_packed``,
of 2:4 ``compressed`` and ``bitmask`` or ``meta``), 8-bit floats with scales, bitsandbytes (``absmax``), ModelOpt, and
MXFP4 of gpt-oss (``blocks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simulator.models.headers import Tensor

PARTS: tuple[str, ...] = (
    *("weight", "qweight", "weight_packed", "compressed", "blocks"),  # the first there is of these is the weight itself
    *("bias", "qzeros", "scales", "g_idx", "perm", "bitmask", "row_offsets", "shape", "meta", "scale_packed"),
    *(
        f"weight_{x}"
        for x in ("scale", "scale_inv", "scale_2", "zero_point", "g_idx", "shape", "global_scale", "format")
    ),
    *("input_scale", "input_global_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "SCB"),
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map", r"quant_state\.bitsandbytes__\w+"),
)
"""Last parts of tensor names that belong to one projection, as patterns."""

FLOATS = ("F64", "F32", "F16", "BF16")
_8_BIT = ("F8_E4M3", "F8_E5M2")
_INTS = {4: "int4", 8: "int8"}


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as the arithmetic sees it."""

    shape: tuple[int, ...]  # [out, in]; of experts in one tensor [experts, in, out]
    dtype: str = ""  # format it is stored in; "" for floats of 16 bits and more
    sparse24: bool = False


def logical(parts: Mapping[str, Tensor], inputs: int = 0, outputs: int = 0, bits: int = 0) -> Weight:
    """The weight of a projection from what is stored of it by last part of the name; ValueError for another layout.

    ``inputs`` and ``outputs`` are its widths where known (0: not): padding of packed rows, and bitsandbytes' shape, no
    header tells; nor the ``bits`` of compressed-tensors.

    >>> logical({"qweight": Tensor("I32", (4096, 1376)), "scales": Tensor("F16", (32, 11008))})  # AWQ
    Weight(shape=(11008, 4096), dtype='int4', sparse24=False)
    """
    name = next((name for name in PARTS[:5] if name in parts), "")
    if not name:
        raise ValueError("has no weight")
    stored = parts[name]
    shape, dtype = stored.shape, stored.dtype
    if name == "blocks" and len(shape) == 4:  # [experts, out, groups, bytes of a group]
        return Weight((shape[0], shape[2] * shape[3] * 2, shape[1]), "mxfp4")
    if name == "weight" and "absmax" in parts:
        return _flat(stored.elements * 2, inputs, outputs)
    if name == "weight" and dtype in FLOATS:
        return Weight(shape)
    if name == "compressed" and len(mask := _of(parts, "bitmask")) == 2:  # a row of bits, padded to bytes, an output
        wide = inputs if -(-inputs // 8) == mask[1] else mask[1] * 8
        return Weight((mask[0], wide), _float(dtype), shape == (mask[0], wide // 2))
    if len(shape) == 2:
        rows, columns = shape
        if name == "weight":
            return Weight((rows, 2 * columns) if dtype == "U8" else shape, _scaled(parts, dtype))
        if name == "weight_packed" and "meta" in parts:  # Marlin-24: tiles of 16 inputs, half of which are stored
            out = _outputs(parts, "scale_packed")
            return Weight((out, rows * 32), _integer(columns * 2, out), True)
        if name == "weight_packed" and dtype == "U8":
            return Weight((rows, 2 * columns), "nvfp4" if "weight_global_scale" in parts else "mxfp4")
        if name == "weight_packed":
            wide = inputs if -(-inputs * bits // 32) == columns else columns * 32 // max(bits, 1)
            return Weight((rows, wide), _integer(bits, 1))
        if name == "qweight":
            return _by_scales(shape, _outputs(parts, "scales"), _of(parts, "qzeros"), _of(parts, "g_idx"))
    raise ValueError(f"is stored as {name} of {dtype} in {len(shape)} dimensions, a layout that is not known")


def _of(parts: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return parts[name].shape if name in parts else ()


def _outputs(parts: Mapping[str, Tensor], scales: str) -> int:
    """Outputs by the scales of each in groups of inputs; 0 where there are none."""
    shape = _of(parts, scales)
    return shape[1] if len(shape) == 2 else 0


def _flat(elements: int, inputs: int, outputs: int) -> Weight:
    known = inputs or outputs
    if not known or elements % known:
        raise ValueError(f"holds {elements:,} elements, which make no matrix of what is known of its widths")
    return Weight((elements // known, known) if inputs else (known, elements // known), "int4")


def _float(dtype: str) -> str:
    if dtype in FLOATS or dtype in _8_BIT:
        return "fp8" if dtype in _8_BIT else ""
    raise ValueError(f"is stored as {dtype}, a layout that is not known")


def _scaled(parts: Mapping[str, Tensor], dtype: str) -> str:
    """Format of a weight of 8 bits or two of 4 in each byte, by the scales beside it."""
    scale = _of(parts, "weight_scale_inv") or _of(parts, "weight_scale")
    if dtype in _8_BIT:
        return "fp8_block" if len(scale) == 2 and scale[1] > 1 else "fp8"
    if dtype == "I8" and (scale or "SCB" in parts):
        return "int8"
    if dtype == "U8" and "weight_scale_2" in parts:
        return "nvfp4"
    return _float(dtype)


def _integer(bits: int, per: int) -> str:
    if not per or bits % per or bits // per not in _INTS:
        raise ValueError("is packed in other than 4 or 8 bits, which no cost model has")
    return _INTS[bits // per]


def _by_scales(shape: tuple[int, int], out: int, zeros: tuple[int, ...], order: tuple[int, ...]) -> Weight:
    """GPTQ packs inputs, AWQ outputs, 32 bits of them an element; ``out`` scales a group, zeros packed by outputs."""
    rows, columns = shape
    if not out:
        raise ValueError("has no scales for each output")
    if columns != out:
        return Weight((out, rows), _integer(32 * columns, out))
    wide = len(order) == 1 and order[0]
    bits = 32 * rows // wide if wide else 32 * zeros[1] // out if len(zeros) == 2 else 4
    dtype = _integer(bits, 1)
    return Weight((out, wide or rows * 32 // bits), dtype)
