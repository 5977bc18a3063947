"""Find the axes of a weight by the name of its tensor (:func:`axes_of`), and shape and format of a projection that a
checkpoint stores in packed parts (:func:`logical`).

Names are those of Transformers. Two methods change them: a low-rank projection is stored as its two factors (SVD-LLM's
``q_u_proj`` and ``q_v_proj``, ASVD's ``q_proj.ALinear`` and ``q_proj.BLinear``), and SliceGPT stores the matrices that
rotate its residual stream (``attn_shortcut_Q``, ``mlp_shortcut_Q``). The packed layouts are GPTQ and AWQ (``qweight``),
compressed-tensors (``weight_packed``, for 2:4 ``compressed`` and ``bitmask`` or ``meta``), 8-bit floats with scales,
bitsandbytes (``absmax``), ModelOpt, and MXFP4 of gpt-oss (``blocks``). Only names, dtypes and shapes are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from simulator.models.headers import Tensor

# names of the part that holds the weight itself; the first that exists is used
WEIGHTS = ("weight", "qweight", "weight_packed", "compressed", "blocks")

# last parts of the names of tensors that belong to one projection
_PARTS = (
    rf"{'|'.join(WEIGHTS)}|weight_(?:scale|scale_inv|scale_2|zero_point|g_idx|shape|global_scale|format)|bias|qzeros|"
    r"scales|g_idx|perm|bitmask|row_offsets|shape|meta|scale_packed|input_scale|input_global_scale|input_zero_point|"
    r"output_scale|k_scale|v_scale|SCB|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.bitsandbytes__\w+"
)
NAME = re.compile(
    r"(?:(?:_orig_mod|base_model|language_model|model|decoder|gpt_neox)\.)*(?:layers\.(\d{1,5})\.)?"
    rf"(.+?)(?:(?:\.weight)?\.({_PARTS})|_(blocks|scales))?"
)
BUFFER = re.compile(r"(?:.*[._])?(?:rotary_emb|inv_freq|masked_bias)(?:\..*)?")

# Axes of a weight: h hidden size, q and kv width of queries and keys, o inputs of the output projection, i and e inner
# widths of MLP and experts, E experts, V vocabulary, P positions; 2i is twice i. A bias has the first axis. "out" are
# the outputs of an MLP, and H the inputs of the head: both are h except in the last layer of SliceGPT. A gated delta
# net has values, channels of its convolution, conv positions, delta heads, and features of a value head.
ATTENTION, MLP = r"(?:self_attn|attention|attn)\.", r"(?:(?:mlp|feed_forward)\.(?:shared_experts?\.)?)?"
ROUTED = r"(?:mlp|block_sparse_moe|feed_forward)\."
EXPERT, EXPERTS = ROUTED + r"experts\.\d{1,5}\.", ROUTED + r"experts\."
_DELTA = r"linear_attn\."
# fmt: off
LAYER = tuple((re.compile(pattern), tuple(axes.split())) for pattern, axes in {
    ATTENTION + "q_proj": "q h",
    ATTENTION + "[kv]_proj": "kv h",
    ATTENTION + "(?:qkv_proj|query_key_value)": "qkv h",
    ATTENTION + "(?:o_proj|out_proj|dense)": "h o",
    ATTENTION + "q_(?:norm|layernorm)": "q_norm",
    ATTENTION + "k_(?:norm|layernorm)": "k_norm",
    ATTENTION + "sinks": "heads",
    ATTENTION + "q_a_proj": "q_rank h",
    ATTENTION + "q_a_layernorm": "q_rank",
    ATTENTION + "q_b_proj": "q q_rank",
    ATTENTION + "kv_a_proj_with_mqa": "kv_a h",
    ATTENTION + "kv_a_layernorm": "rank",
    ATTENTION + "kv_b_proj": "kv_b rank",
    ATTENTION + "linear_attn": "h h",
    _DELTA + "in_proj_qkvz": "delta_in h",
    _DELTA + "in_proj_ba": "2delta h",
    _DELTA + "conv1d": "channels 1 conv",
    _DELTA + "(?:dt_bias|A_log)": "delta",
    _DELTA + "norm": "value",
    _DELTA + "out_proj": "h values",
    MLP + "(?:gate_proj|up_proj|fc1|dense_h_to_4h)": "i h",
    MLP + "gate_up_proj": "2i h",
    MLP + "(?:down_proj|fc2|dense_4h_to_h)": "out i",
    "attn_shortcut_Q": "h h",
    "mlp_shortcut_Q": "h out",
    "mlp.linear_mlp": "h h",
    ROUTED + "(?:gate|router)": "E h",
    "mlp.gate.e_score_correction_bias": "E",
    "mlp.shared_expert_gate": "1 h",
    EXPERT + "(?:w1|w3|gate_proj|up_proj)": "e h",
    EXPERT + "(?:w2|down_proj)": "h e",
    EXPERTS + "gate_up_proj": "E h 2e",
    EXPERTS + "down_proj": "E e h",
    EXPERTS + "gate_up_proj_bias": "E 2e",
    EXPERTS + "down_proj_bias": "E h",
    "(?:input|post_attention|pre_feedforward|post_feedforward|self_attn|final)_layer_?norm": "h",
}.items())
OUTSIDE = tuple((re.compile(pattern), tuple(axes.split())) for pattern, axes in {
    "embed_tokens|embed_in": "V h", "lm_head|embed_out": "V H", "embed_positions": "P h",
    "norm|final_layer_?norm": "H",
}.items())
# fmt: on
WIDE = re.compile(r".*(?:norm|router|\bgate|shared_expert_gate|sinks|bias|in_proj_ba|conv1d|A_log)")
"""Weights in the format of the residual stream."""

_FACTOR = re.compile(r"(?:(.*\.)?([qkvo]|gate|up|down)_([uv])_proj|(.+)\.([AB])Linear)")
_ROLES = {
    **{"qkv_proj": "qkv", "query_key_value": "qkv", "out_proj": "o", "dense": "o", "fc1": "up", "dense_h_to_4h": "up"},
    **{"fc2": "down", "dense_4h_to_h": "down"},
    **{f"{role}_proj": role for role in ("q", "k", "v", "o", "gate", "up", "gate_up", "down")},
}


def factor_of(module: str) -> tuple[str, str, bool]:
    """Return the projection of a factor, its role, and whether the factor makes the outputs of the projection.

    A module that is not a factor has the role ""."""
    match = _FACTOR.fullmatch(module) if module.endswith(("_u_proj", "_v_proj", "Linear")) else None
    if match is None:
        return module, "", False
    inside, name, half, base, letter = match.groups()
    if base is None:
        return f"{inside or ''}{name}_proj", name, half == "u"
    return base, _ROLES.get(base.rsplit(".", 1)[-1], ""), letter == "A"


def axes_of(module: str, table: Iterable[tuple[re.Pattern[str], tuple[str, ...]]]) -> tuple[str, ...]:
    """Return the axes of a module's weight, none for an unknown name. The rank of a factor is named after its
    projection."""
    base, role, makes = factor_of(module)
    axes = next((axes for pattern, axes in table if pattern.fullmatch(base)), ())
    if not role:
        return axes if base == module else ()
    if len(axes) != 2 or re.match(EXPERT, base):
        return ()
    return (axes[0], f"rank {role}") if makes else (f"rank {role}", axes[1])


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
