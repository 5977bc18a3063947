"""Names and shapes of the tensors of a model in its architecture, and in the layouts of
quantisers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from simulator.models.checkpoint import BITS, Tensor
from simulator.models.library import FOLDER
from simulator.models.model import Model
from simulator.models.sublayers import Attention, DeltaNet, Experts, LatentAttention, Linear, Mlp
from simulator.models.sublayers.base import Sublayer

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]
LAYOUTS = tuple(
    [
        "gptq",
        "gptq8",
        "awq",
        "packed",
        "int8",
        "fp8",
        "fp8_block",
        "bnb",
        "nvfp4",
        "bitmask",
        "bitmask8",
    ]
)
PLURAL = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe")
"""Architectures whose shared experts are called ``shared_experts``."""
PROJECTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
)


def tensors_of(model: Model) -> Tensors:
    """All tensors of a model in F16."""
    return {name: Tensor("F16", shape) for name, shape in _shapes(model)}


def _shapes(m: Model) -> Iterator[tuple[str, Shape]]:
    opt, neox = m.architecture == "opt", m.architecture == "gpt_neox"
    top = "model.decoder." if opt else "gpt_neox." if neox else "model."
    yield top + ("embed_in" if neox else "embed_tokens") + ".weight", (m.vocab, m.hidden)
    if not m.tied:
        yield ("embed_out" if neox else "lm_head") + ".weight", (m.vocab, m.hidden)
    if m.learned_positions:
        yield top + "embed_positions.weight", (m.learned_positions, m.hidden)
    yield from _norm(top + ("final_layer_norm" if opt or neox else "norm"), m)
    for number, layer in zip(m.layer_numbers, m.layers):
        at = f"{top}layers.{number}."
        if attention := layer.of("attention"):
            yield from _attention(m, attention, at + ("attention." if neox else "self_attn."))
            if m.pre_norms:
                yield from _norm(at + ("self_attn_layer_norm" if opt else "input_layernorm"), m)
            if m.post_norms:
                yield from _norm(at + "post_attention_layernorm", m)
        if mlp := layer.of("mlp"):
            yield from _mlp(m, mlp, at)
            before = "pre_feedforward_layernorm" if m.post_norms else "post_attention_layernorm"
            if m.pre_norms:
                yield from _norm(at + ("final_layer_norm" if opt else before), m)
            if m.post_norms:
                yield from _norm(at + "post_feedforward_layernorm", m)


def _norm(name: str, m: Model) -> Iterator[tuple[str, Shape]]:
    yield from _linear(name, (m.hidden,), m.norm == "layer")


def _linear(name: str, shape: Shape, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield name + ".weight", shape
    if bias:
        yield name + ".bias", shape[:1]


def _attention(m: Model, attention: Sublayer, at: str) -> Iterator[tuple[str, Shape]]:
    out = {"opt": "out_proj", "gpt_neox": "dense"}.get(m.architecture, "o_proj")
    if isinstance(attention, Linear):
        yield at + "linear_attn.weight", (m.hidden, m.hidden)
    elif isinstance(attention, DeltaNet):
        yield from _delta_net(attention, m.hidden, at.replace("self_attn", "linear_attn"))
    elif isinstance(attention, LatentAttention):
        yield from _latent(attention, m.hidden, at, out)
    elif isinstance(attention, Attention):
        yield from _grouped(m, attention, at, out)


def _delta_net(net: DeltaNet, hidden: int, at: str) -> Iterator[tuple[str, Shape]]:
    keys, values = net.kv_heads * net.key, net.heads * net.value
    yield at + "in_proj_qkvz.weight", (2 * keys + 2 * values, hidden)
    yield at + "in_proj_ba.weight", (2 * net.heads, hidden)
    yield at + "conv1d.weight", (2 * keys + values, 1, net.conv)
    yield at + "dt_bias", (net.heads,)
    yield at + "A_log", (net.heads,)
    yield at + "norm.weight", (net.value,)
    yield at + "out_proj.weight", (hidden, values)


def _latent(latent: LatentAttention, hidden: int, at: str, out: str) -> Iterator[tuple[str, Shape]]:
    heads, queries = latent.heads, latent.heads * (latent.plain + latent.rotary)
    if latent.query_rank:
        yield from _linear(at + "q_a_proj", (latent.query_rank, hidden))
        yield from _linear(at + "q_a_layernorm", (latent.query_rank,))
        yield from _linear(at + "q_b_proj", (queries, latent.query_rank))
    else:
        yield from _linear(at + "q_proj", (queries, hidden))
    yield from _linear(at + "kv_a_proj_with_mqa", (latent.rank + latent.rotary, hidden))
    yield from _linear(at + "kv_a_layernorm", (latent.rank,))
    yield from _linear(at + "kv_b_proj", (heads * (latent.plain + latent.value), latent.rank))
    yield from _linear(at + out, (hidden, heads * latent.value))


def _grouped(m: Model, a: Attention, at: str, out: str) -> Iterator[tuple[str, Shape]]:
    h, q, kv = m.hidden, a.heads * a.head_dim, a.kv_heads * a.head_dim
    if m.architecture in ("phi3", "gpt_neox"):
        fused = "qkv_proj" if m.architecture == "phi3" else "query_key_value"
        yield from _linear(at + fused, (q + 2 * kv, h), a.qkv_bias)
    else:
        for name, wide in (("q_proj", (1 + a.gate) * q), ("k_proj", kv), ("v_proj", kv)):
            yield from _linear(at + name, (wide, h), a.qkv_bias)
    yield from _linear(at + out, (h, q), a.o_bias)
    if a.norm in ("head", "width"):
        wides = (a.head_dim, a.head_dim) if a.norm == "head" else (q, kv)
        yield from zip((at + "q_norm.weight", at + "k_norm.weight"), ((wide,) for wide in wides))
    if a.sinks:
        yield at + "sinks", (a.heads,)
    yield (at + "rotary_emb.inv_freq", (a.head_dim // 2,))
    if m.architecture == "gpt_neox":
        yield at + "bias", (1, 1, 64, 64)
        yield at + "masked_bias", ()


def _mlp(m: Model, mlp: Sublayer, at: str) -> Iterator[tuple[str, Shape]]:
    inside = at + ("feed_forward." if m.architecture == "llama4_text" else "mlp.")
    if isinstance(mlp, Linear):
        yield at + "mlp.linear_mlp.weight", (m.hidden, m.hidden)
    elif isinstance(mlp, Experts):
        if mlp.shared is not None:
            shared = "shared_experts." if m.architecture in PLURAL else "shared_expert."
            yield from _dense_mlp(m, mlp.shared, at, inside + shared)
        yield from _experts(m, mlp, at, inside)
    elif isinstance(mlp, Mlp):
        yield from _dense_mlp(m, mlp, at, inside)


def _dense_mlp(m: Model, mlp: Mlp, at: str, inside: str) -> Iterator[tuple[str, Shape]]:
    h, i = m.hidden, mlp.inner
    if m.architecture == "phi3":
        yield from _linear(at + "mlp.gate_up_proj", (2 * i, h))
        yield from _linear(at + "mlp.down_proj", (h, i))
    elif not mlp.gated:
        names = (
            ("fc1", "fc2")
            if m.architecture == "opt"
            else ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        )
        for name, shape in zip(names, ((i, h), (h, i))):
            yield from _linear(at + name, shape, mlp.bias)
    else:
        yield from _linear(inside + "gate_proj", (i, h), mlp.bias)
        yield from _linear(inside + "up_proj", (i, h), mlp.bias)
        yield from _linear(inside + "down_proj", (h, i), mlp.bias or mlp.down_bias)


def _experts(m: Model, x: Experts, at: str, inside: str) -> Iterator[tuple[str, Shape]]:
    h, e = m.hidden, x.inner
    if m.architecture == "gpt_oss":
        yield from _linear(at + "mlp.router", (x.experts, h), True)
        fused = {"gate_up_proj": (h, 2 * e), "down_proj": (e, h)}
        for name, shape in fused.items():
            yield f"{at}mlp.experts.{name}", (x.experts, *shape)
            yield f"{at}mlp.experts.{name}_bias", (x.experts, shape[1])
        return
    if m.architecture == "llama4_text":
        yield f"{inside}router.weight", (x.experts, h)
        yield f"{inside}experts.gate_up_proj", (x.experts, h, 2 * e)
        yield f"{inside}experts.down_proj", (x.experts, e, h)
        return
    mixtral = m.architecture == "mixtral"
    inside = at + ("block_sparse_moe." if mixtral else "mlp.")
    yield from _linear(inside + "gate", (x.experts, h))
    if x.router_bias:
        yield inside + "gate.e_score_correction_bias", (x.experts,)
    if x.shared_gate:
        yield from _linear(inside + "shared_expert_gate", (1, h))
    for number in range(x.experts):
        for name, shape in zip(
            ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj"),
            ((e, h), (e, h), (h, e)),
        ):
            yield f"{inside}experts.{number}.{name}.weight", shape


def stored_as(layout: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The same weights in a quantiser's layout."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module.rpartition(".")[2] not in PROJECTION:
            out[name] = tensor
            continue
        n, k = tensor.shape
        groups = -(-k // 128)
        parts = {
            "gptq": {
                "qweight": ("I32", (k // 8, n)),
                "qzeros": ("I32", (groups, n // 8)),
                "scales": ("F16", (groups, n)),
                "g_idx": ("I32", (k,)),
            },
            "gptq8": {
                "qweight": ("I32", (k // 4, n)),
                "qzeros": ("I32", (groups, n // 4)),
                "scales": ("F16", (groups, n)),
            },
            "awq": {
                "qweight": ("I32", (k, n // 8)),
                "qzeros": ("I32", (groups, n // 8)),
                "scales": ("F16", (groups, n)),
            },
            "packed": {
                "weight_packed": ("I32", (n, -(-k // 8))),
                "weight_scale": ("BF16", (n, groups)),
                "weight_shape": ("I64", (2,)),
            },
            "int8": {"weight": ("I8", (n, k)), "weight_scale": ("BF16", (n, 1))},
            "fp8": {
                "weight": ("F8_E4M3", (n, k)),
                "weight_scale": ("F32", ()),
                "input_scale": ("F32", ()),
            },
            "fp8_block": {
                "weight": ("F8_E4M3", (n, k)),
                "weight_scale_inv": ("F32", (-(-n // 128), groups)),
            },
            "bnb": {
                "weight": ("U8", (n * k // 2, 1)),
                "weight.absmax": ("U8", (n * k // 64,)),
                "weight.quant_map": ("F32", (16,)),
                "weight.quant_state.bitsandbytes__nf4": ("U8", (96,)),
            },
            "nvfp4": {
                "weight_packed": ("U8", (n, k // 2)),
                "weight_scale": ("F8_E4M3", (n, k // 16)),
                "weight_global_scale": ("F32", (1,)),
                "input_global_scale": ("F32", (1,)),
            },
            "bitmask": {
                "compressed": ("BF16", (n, k // 2)),
                "bitmask": ("U8", (n, k // 8)),
                "shape": ("I64", (2,)),
            },
            "bitmask8": {
                "compressed": ("F8_E4M3", (n, k // 2)),
                "bitmask": ("U8", (n, k // 8)),
                "weight_scale": ("BF16", (n, 1)),
            },
        }[layout]
        out |= {f"{module}.{part}": Tensor(dtype, shape) for part, (dtype, shape) in parts.items()}
    return out


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file whose weights are a hole."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.elements * BITS[tensor.dtype] // 8
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    write(path, json.dumps(header | {"__metadata__": {"format": "pt"}}).encode(), end)


def save_shards(folder: Path, tensors: Mapping[str, Tensor], many: int) -> None:
    names = list(tensors)
    parts = {f"model-{i:05}.safetensors": names[i::many] for i in range(many)}
    for file, inside in parts.items():
        save(folder / file, {name: tensors[name] for name in inside})
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write(path: Path, header: bytes, room: int = 0, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    os.truncate(path, 8 + len(header) + room)


def folder_of(tmp_path: Path, name: str) -> Path:
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(content | {"_name_or_path": name}))
    return tmp_path
