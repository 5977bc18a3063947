"""Find the axes of a weight by the name of its tensor: :func:`axes_of`.

Names are those of Transformers. Two methods change them: a low-rank projection is stored as its two factors (SVD-LLM's
``q_u_proj`` and ``q_v_proj``, ASVD's ``q_proj.ALinear`` and ``q_proj.BLinear``), and SliceGPT stores the matrices that
rotate its residual stream (``attn_shortcut_Q``, ``mlp_shortcut_Q``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from simulator.models.packed import PARTS

NAME = re.compile(
    r"(?:(?:_orig_mod|base_model|language_model|model|decoder|gpt_neox)\.)*(?:layers\.(\d{1,5})\.)?"
    rf"(.+?)(?:(?:\.weight)?\.({'|'.join(PARTS)})|_(blocks|scales))?"
)
BUFFER = re.compile(r"(?:.*[._])?(?:rotary_emb|inv_freq|masked_bias)(?:\..*)?")

# Axes of a weight: h hidden size, q and kv width of queries and keys, o inputs of the output projection, i and e inner
# widths of MLP and experts, E experts, V vocabulary, P positions; 2i is twice i. A bias has the first axis. "out" are
# the outputs of an MLP and H those of all layers, h except in SliceGPT's last layer. Of a gated delta net: values,
# channels of the convolution, 1, conv positions, delta heads, features of a value head.
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
    """Return the projection that a factor belongs to, its role, and whether the factor makes its outputs.

    The role of a module that is not a factor is ""."""
    match = _FACTOR.fullmatch(module) if module.endswith(("_u_proj", "_v_proj", "Linear")) else None
    if match is None:
        return module, "", False
    inside, name, half, base, letter = match.groups()
    if base is None:
        return f"{inside or ''}{name}_proj", name, half == "u"
    return base, _ROLES.get(base.rsplit(".", 1)[-1], ""), letter == "A"


def axes_of(module: str, table: Iterable[tuple[re.Pattern[str], tuple[str, ...]]]) -> tuple[str, ...]:
    """Return the axes of a module's weight, none for an unknown name; a rank is named after its projection."""
    base, role, makes = factor_of(module)
    axes = next((axes for pattern, axes in table if pattern.fullmatch(base)), ())
    if not role:
        return axes if base == module else ()
    if len(axes) != 2 or re.match(EXPERT, base):
        return ()
    return (axes[0], f"rank {role}") if makes else (f"rank {role}", axes[1])
