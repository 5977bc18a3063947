"""Models of the library Transformers with the shapes of a workload, dense or pruned, and random weights.

Use :func:`build`. The library makes the model from a ``config.json`` where that states the shapes: fewer layers,
narrower MLPs, fewer heads or experts, a smaller hidden size. Layers that differ, low-rank factors and missing sublayers
are patched into the modules of the library; :attr:`HfModel.patched` states this.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from calibration.devices.operators import TORCH_DTYPE
from calibration.devices.protocol import Unsupported
from calibration.devices.sparse import sparse_weight
from simulator.codes import ROLES, Kernel, Kind
from simulator.errors import InputError
from simulator.models.block import Block
from simulator.models.changes import changed_keys
from simulator.models.config import ModelConfig
from simulator.models.huggingface import from_hf_config
from simulator.workload import Workload

PROJECTIONS: Mapping[str, str] = {
    **{role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}
"""Role of a projection -> its module in a decoder layer of Llama and the models derived from it."""

_NEUTRAL: Mapping[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
"""Special tokens, which may lie outside the vocabulary of a small model; passes here need none."""
_SHARED = "shared_expert_intermediate_size"
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Layout:
    """Shapes of a decoder: its hidden size, and each layer."""

    hidden: int
    layers: tuple[Block, ...]

    @property
    def usual(self) -> Block:
        """The most frequent layer with attention and an MLP, as whole weights."""
        whole = Counter(replace(b, ranks=()) for b in self.layers if b.heads and (b.inner or b.experts))
        if not whole:
            raise InputError("no layer has attention and an MLP")
        return whole.most_common(1)[0][0]


def layout_of(w: Workload) -> Layout:
    """Return the shapes of the decoder of a workload on one device.

    InputError: it has operators that no static model of Transformers has (routers, scattered tokens, gathers).
    """
    if (w.overhead & (w.stage == 0)).any() or (w.kernel == Kernel.BLOCK_SPARSE).any():
        raise InputError("it decides during a pass, which no model of Transformers does; use --engine reference")
    rows, layers = w.expand(), dict[int, dict[str, Any]]()
    inside = rows.layer >= 0
    for i in inside.nonzero()[0].tolist():
        found = layers.setdefault(int(rows.layer[i]), {"heads": 0, "kv_heads": 0, "inner": 0, "ranks": {}})
        role, kind = ROLES[rows.role[i]], rows.kind[i]
        if rows.is_attention[i]:
            found |= {"heads": int(rows.heads[i]), "kv_heads": int(rows.kv_heads[i])}
        elif kind == Kind.EXPERTS:
            found |= {"experts": int(rows.experts[i]), "active": float(rows.active[i]), "expert_inner": int(rows.n[i])}
        elif kind == Kind.GEMM and rows.stage[i] == 1:
            found["ranks"][role] = int(rows.n[i])
        if kind == Kind.GEMM and role == "down" and rows.stage[i] < 2:
            found["inner"] = int(rows.k[i])
    blocks = (Block(**{**layers[i], "ranks": tuple(sorted(layers[i]["ranks"].items()))}) for i in sorted(layers))
    return Layout(int(rows.k[rows.is_role("lm_head")][0]), tuple(blocks))


def check(model: ModelConfig, content: Mapping[str, Any], w: Workload) -> tuple[Layout, Any]:
    """Return the layout of a workload, and the library's configuration of the model that is patched to it.

    InputError: Transformers cannot build the model, with the reason.
    """
    from transformers import AutoConfig

    layout = layout_of(w)
    usual, many = layout.usual, len(layout.layers)
    new = replace(model.with_usual(usual, ()), layers=many, windows=model.windows[:many], hidden=layout.hidden)
    keys = {**_NEUTRAL, **changed_keys(model, new)}
    width = "moe_intermediate_size" if "moe_intermediate_size" in content else "intermediate_size"
    number = next((key for key in _EXPERT_KEYS if key in content), _EXPERT_KEYS[0])
    for name, key in (("experts", number), ("active", "num_experts_per_tok"), ("expert_inner", width)):
        if getattr(new, name) != getattr(model, name):
            keys[key] = round(getattr(new, name))
    if new.inner != model.inner and _SHARED in content:
        keys[_SHARED] = new.inner
    whole = {**content, "num_hidden_layers": many, **keys}  # content may have more layers than ``model``
    if isinstance(types := whole.get("layer_types"), list):
        whole["layer_types"] = types[:many]
    if not content or replace(from_hf_config(whole), name=new.name, blocks=()) != new:
        named = ", ".join(key for key in keys if key not in _NEUTRAL) or "its shapes"
        raise InputError(f"a config.json of {model.name} cannot state {named} together")
    if any(_routed(b) != _routed(usual) for b in layout.layers if b.experts):
        raise InputError("its experts differ by layer; Transformers runs equally many in all layers")
    try:
        config = AutoConfig.for_model(**whole)
    except Exception as error:  # the library's checks have no public base class
        raise InputError(
            f"Transformers refuses its config.json: {str(error).splitlines()[-1].strip().removeprefix('ValueError: ')}"
        ) from None
    config.head_dim = model.head_dim
    return layout, config


def _routed(block: Block) -> tuple[int, float, int]:
    return block.experts, block.active, block.expert_inner


@dataclass(frozen=True)
class HfModel:
    """A causal language model of Transformers."""

    model: Any
    patched: str  # what the library does not build by itself; "" for nothing

    @property
    def cache_name(self) -> str:
        """Name of the argument for keys and values, which differs by version."""
        names = inspect.signature(type(self.model).forward).parameters
        return "cache" if "cache" in names else "past_key_values"


def build(
    model: ModelConfig, content: Mapping[str, Any], w: Workload, *, dtype: str, device: str, seed: int = 0
) -> HfModel:
    """Return the model of a workload with random weights.

    Parameters
    ----------
    model : ModelConfig
        The dense model.
    content : mapping
        Content of its ``config.json``.
    w : Workload
        The dense or pruned model, on one device.
    dtype : str
        fp32, bf16 or fp16.
    device : str
        Device of torch.
    seed : int
        Seed of the weights.

    Returns
    -------
    HfModel
        The model in evaluation mode, with attention by torch's ``scaled_dot_product_attention`` where it has that.

    Raises
    ------
    InputError
        If Transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    layout, config = check(model, content, w)
    torch.manual_seed(seed)
    with torch.device(device):
        try:
            made = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPE[dtype], attn_implementation="sdpa")
        except ValueError:  # the model soft-caps its scores, which that function does not
            made = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPE[dtype], attn_implementation="eager")
    made.eval()
    patched = _patch(made, layout)
    _sparsify(made, w)
    made.requires_grad_(False)
    _check_weights(made, w)
    return HfModel(made, patched)


def _patch(made: Any, layout: Layout) -> str:
    """Change layers that differ from the usual one; return what was changed."""
    usual, changed = layout.usual, Counter[str]()
    attention = 0
    for number, block in enumerate(layout.layers):
        layer = made.model.layers[number]
        if block != usual:
            changed.update(_change(layer, block, usual))
        if block.heads:  # the cache counts attention layers
            layer.self_attn.layer_idx = attention
            attention += 1
    return ", ".join(f"{what} in {count} layers" for what, count in changed.items())


def _change(layer: nn.Module, block: Block, usual: Block) -> list[str]:
    """Change one layer to a block; return what was changed."""
    out = []
    for role, where in PROJECTIONS.items():
        there = block.heads if where.startswith("self_attn") else block.inner
        if not there or (where.startswith("mlp") and not usual.inner):
            continue
        old = _module(layer, role)
        n, k, rank = old.out_features, old.in_features, block.rank(role)
        before, after = (
            {"q": b.heads, "o": b.heads, "k": b.kv_heads, "v": b.kv_heads}.get(role, b.inner) for b in (usual, block)
        )
        n, k = (n, k // before * after) if role in ("o", "down") else (n // before * after, k)
        if rank or (n, k) != (old.out_features, old.in_features):
            layer.set_submodule(where, _projection(old, n, k, rank))
            narrower = "other widths of attention" if where.startswith("self_attn") else "other widths of the MLP"
            out.append("low rank" if rank else narrower)
    if block.heads and (block.heads, block.kv_heads) != (usual.heads, usual.kv_heads):
        layer.self_attn.num_key_value_groups = block.heads // max(block.kv_heads, 1)
    if missing := [name for name, there in _sublayers(block).items() if not there]:
        for name in missing:
            layer.set_submodule(name, nn.Identity())
        layer.forward = partial(_without, layer, missing[0])
        out.append(f"no {'attention' if missing[0] == 'self_attn' else 'MLP'}")
    return list(dict.fromkeys(out))


def _module(layer: nn.Module, role: str) -> Any:
    """Return the module of a projection; InputError if the model has joined projections."""
    try:
        return layer.get_submodule(PROJECTIONS[role])
    except AttributeError:
        raise InputError(f"{type(layer).__name__} of Transformers has no {PROJECTIONS[role]} to patch") from None


def _sublayers(block: Block) -> dict[str, bool]:
    return {"self_attn": bool(block.heads), "mlp": bool(block.inner or block.experts)}


def _without(layer: Any, missing: str, hidden_states: Any, **context: Any) -> Any:
    """The pass of a layer with one sublayer, as that of Llama with both."""
    if missing == "mlp":
        return hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **context)[0]
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def _projection(old: Any, n: int, k: int, rank: int) -> nn.Module:
    """Return a projection of other shapes, or two factors, with random weights."""

    def linear(rows: int, columns: int, bias: bool) -> nn.Linear:
        new = nn.Linear(columns, rows, bias=bias, device=old.weight.device, dtype=old.weight.dtype)
        nn.init.normal_(new.weight, std=1.0 / math.sqrt(columns))
        return new

    bias = old.bias is not None
    return nn.Sequential(linear(rank, k, False), linear(n, rank, bias)) if rank else linear(n, k, bias)


def _sparsify(made: Any, w: Workload) -> None:
    """Pack the projections that are 2:4 sparse; set the share of scattered zeros of others."""
    if not (w.kernel != Kernel.DENSE).any():
        return
    from calibration.runners.decoder.families import two_of_four

    shares = {}
    for i in ((w.layer >= 0) & (w.kind == Kind.GEMM)).nonzero()[0].tolist():
        shares[ROLES[w.role[i]]] = (Kernel(int(w.kernel[i])), float(w.density[i]))
    for layer in made.model.layers:
        for role, (kernel, density) in shares.items():
            old = _module(layer, role)
            if kernel == Kernel.SPARSE24:
                if old.weight.device.type != "cuda":
                    raise Unsupported(f"2:4 needs sparse tensor cores; device {old.weight.device} has none")
                packed = sparse_weight(two_of_four(old.weight.data), searched=False)
                old.forward = partial(packed.linear, bias=old.bias)
            elif kernel == Kernel.UNSTRUCTURED:
                old.weight.data.mul_(torch.rand_like(old.weight) < density)


def _check_weights(made: Any, w: Workload) -> None:
    """Raise InputError if the weights of the projections are not as many as those that are predicted."""
    once = w.phase == w.phase.min()  # a request has the rows of its prefill and those of its decode steps
    inside = once & (w.layer >= 0) & (w.kind == Kind.GEMM)
    expected = float((w.n * w.k * w.count)[inside].sum())
    routed = once & (w.kind == Kind.EXPERTS)
    expected += float((3.0 * w.experts * w.n * w.k * w.count)[routed].sum())
    found = 0
    for module in made.model.layers.modules():
        own = module.named_parameters(recurse=False)
        found += sum(p.numel() for name, p in own if p.dim() > 1)
    if found != round(expected):
        raise InputError(f"Transformers builds {found:,} weights in its layers; {expected:,.0f} are predicted")
