"""Read and write the shapes of single layers as architecture searches state them: ``block_configs``.

DeciLM (model type ``nemotron-nas``) writes query heads per key/value head, ``n_heads_in_group``, and the MLP's width as
a multiple of the hidden size, ``ffn_mult``, which is rounded up to a multiple of 256. NVIDIA ModelOpt (Puzzletron)
writes ``num_key_value_heads``, ``intermediate_size``, and ``moe`` for routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simulator.errors import InputError
from simulator.models.config import Block, ModelConfig
from simulator.models.keys import Reader

ROUNDING = 256  # deciLM rounds the widths of MLPs up to multiples of this number
_MOE = {"experts": "num_local_experts", "active": "num_experts_per_tok", "expert_inner": "expert_intermediate_dim"}
_UNSUPPORTED = {
    "mamba": "state-space layers are not supported",
    "llama4": "attention settings per layer are not supported",
    "sparsify": "sparsity per layer is not supported",
    "parallel_blocks": "parallel blocks are not supported",
}


def read_block(of: Reader, dense: Block, hidden: int) -> Block:
    """Return a layer of ``block_configs`` (objects ``attention`` and ``ffn``): ``dense`` with other sizes."""
    _check_supported(of)
    return _read_mlp(of.part("ffn"), _read_attention(of.part("attention"), dense), hidden)


def _read_attention(of: Reader, dense: Block) -> Block:
    """Return the layer ``dense`` with the attention of an object: its KV heads, a linear product, or none."""
    _check_supported(of)
    other = tuple(name for name in dense.linear if name != "attention")
    gone = replace(dense, heads=0, kv_heads=0, delta=False, linear=other)
    if of.flag("no_op"):
        return gone
    if of.flag("replace_with_linear"):
        return replace(gone, linear=("attention", *other))
    if dense.delta or not dense.heads:
        raise of.fail("no_op", "expected true, as the dense layer has no such attention")
    groups = None
    if of.data.get("num_key_value_heads") is not None:
        groups = of.integer("num_key_value_heads")
        if dense.heads % groups:
            raise of.fail("num_key_value_heads", f"expected a divisor of {dense.heads} query heads, got {groups}")
    if groups is None or of.data.get("n_heads_in_group") is not None:
        if of.data.get("n_heads_in_group") is None:
            raise of.fail("n_heads_in_group", "missing; expected an integer, here or in num_key_value_heads")
        size = of.integer("n_heads_in_group")
        if dense.heads % size:
            raise of.fail("n_heads_in_group", f"expected a divisor of num_attention_heads {dense.heads}, got {size}")
        if groups not in (None, dense.heads // size):
            raise of.fail("n_heads_in_group", f"expected {dense.heads // groups}, as num_key_value_heads, got {size}")
        groups = dense.heads // size
    return replace(dense, kv_heads=groups, linear=other)


def _read_mlp(of: Reader, dense: Block, hidden: int) -> Block:
    """Return the layer ``dense`` with the MLP of an object: its width, routed experts, a linear product, or none."""
    _check_supported(of)
    other = tuple(name for name in dense.linear if name != "mlp")
    gone = replace(dense, inner=0, experts=0, active=0.0, expert_inner=0, linear=other)
    if of.flag("no_op"):
        return gone
    if of.flag("replace_with_linear"):
        return replace(gone, linear=(*other, "mlp"))
    if of.data.get("moe") is not None:
        return replace(_read_experts(of, dense), linear=other)
    if dense.experts:
        raise of.fail("moe", "missing; expected an object, as the dense layer has routed experts")
    if of.data.get("intermediate_size") is not None:
        return replace(dense, inner=of.integer("intermediate_size"), linear=other)
    if of.data.get("ffn_mult") is None:
        raise of.fail("ffn_mult", "missing; expected a number, here or in intermediate_size")
    exact = int(2 * of.number("ffn_mult", None, high=1000) * hidden / 3)
    return replace(dense, inner=-exact // ROUNDING * -ROUNDING, linear=other)


def _read_experts(of: Reader, dense: Block) -> Block:
    """Return the layer with other routed experts; missing keys are as in the dense layer."""
    if not dense.experts:
        raise of.fail("moe", "expected null, as the dense layer has no routed experts")
    moe = of.part("moe")
    width = "expert_intermediate_size" if "expert_intermediate_size" in moe.data else _MOE["expert_inner"]
    experts = moe.integer(_MOE["experts"], dense.experts)
    # ModelOpt writes a default width of shared experts for models without them
    shared = moe.integer("shared_expert_intermediate_dim", dense.inner, low=0) if dense.inner else 0
    return replace(
        dense,
        inner=shared,
        experts=experts,
        active=float(moe.integer(_MOE["active"], min(int(dense.active), experts), high=experts)),
        expert_inner=moe.integer(width, dense.expert_inner),
    )


def _check_supported(of: Reader) -> None:
    for key, why in _UNSUPPORTED.items():
        if of.data.get(key) is not None:
            raise of.fail(key, f"expected null: {why}")


def block_config(block: Block, dense: Block) -> dict[str, Any]:
    """Return a layer in the keys of ModelOpt; InputError for a layer that they cannot state."""
    _check_stated(block, dense)
    attention, mlp = _flags(block, "attention"), _flags(block, "mlp")
    # ModelOpt requires sizes of linear sublayers, too, and ignores them
    if not attention["no_op"]:
        attention["num_key_value_heads"] = block.kv_heads or dense.kv_heads or 1
    if block.experts:
        moe = {key: int(getattr(block, name)) for name, key in _MOE.items()}
        mlp |= {"moe": moe | {"shared_expert_intermediate_dim": block.inner}}
    elif not mlp["no_op"]:
        mlp["intermediate_size"] = block.inner or dense.inner or dense.expert_inner or 1
    return {"attention": attention, "ffn": mlp}


def _flags(block: Block, sublayer: str) -> dict[str, Any]:
    linear = sublayer in block.linear
    has = bool(block.heads if sublayer == "attention" else block.inner or block.experts)
    return {"no_op": not (has or linear), "replace_with_linear": linear}


def _check_stated(block: Block, dense: Block) -> None:
    if block.heads not in (0, dense.heads):
        raise InputError(f"block_configs: expected {dense.heads} query heads in each layer, got {block.heads}")
    if block.delta or block.ranks or block.shortcuts or block.out:
        wrong = "delta nets" if block.delta else "factors" if block.ranks else "other hidden sizes"
        raise InputError(f"block_configs: expected layers of attention and MLP, got {wrong}")
    if block.active != int(block.active):
        raise InputError(f"block_configs: expected a whole number of active experts, got {block.active:g}")


def block_configs_of(model: ModelConfig, dense: ModelConfig | None = None) -> list[dict[str, Any]]:
    """Return all layers of a model in the keys of ModelOpt; ``dense`` has the sizes that linear sublayers replaced."""
    dense = dense or model
    if dense.latent is not None:
        raise InputError(f"{dense.name}: block_configs: latent attention is not supported")
    if model.layers != dense.layers:
        raise InputError(f"{model.name}: expected {dense.layers} layers, as {dense.name}, got {model.layers}")
    olds = (replace(old, heads=old.heads or dense.heads) for old in dense.layout)
    return [block_config(block, old) for block, old in zip(model.layout, olds)]


def deci_config(config: Mapping[str, Any], heads: int, hidden: int, window: int = 0) -> dict[str, Any]:
    """Return a layer in the keys of DeciLM, given its object in the keys of ModelOpt."""
    attention, mlp = dict(config["attention"]), dict(config["ffn"])
    groups, inner = attention.pop("num_key_value_heads", 0), mlp.pop("intermediate_size", 0)
    if not (attention["no_op"] or attention["replace_with_linear"]):
        attention["n_heads_in_group"] = heads // groups
    if window:
        attention["window_length"] = window
    if not (mlp["no_op"] or mlp["replace_with_linear"]):
        mlp["ffn_mult"] = 3 * inner / (2 * hidden)
    return {"attention": attention, "ffn": mlp}
