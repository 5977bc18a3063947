"""Weights of a Llama-style decoder, dense or pruned, as frozen data: projections, sublayers, layers, and what is decided while running.

Models are those with RMS norms before each sublayer, rotary positions, a gated MLP and grouped-query attention (Llama, Mistral, Qwen2,
Qwen3, SmolLM2, Phi-3); others are refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from calibration.devices.operators import TORCH_DTYPE
from simulator.errors import InputError, unknown
from simulator.models.config import ModelConfig

Tensor = Any

EPSILON = 1e-5


@dataclass(frozen=True)
class Projection:
    """One weight (n, k), or several that are applied one after the other, and a bias."""

    factors: tuple[Tensor, ...]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        for weight in self.factors[:-1]:
            x = F.linear(x, weight)
        return F.linear(x, self.factors[-1], self.bias)

    @property
    def weight(self) -> Tensor:
        """The one weight of a dense projection; families that slice or mask weights need it."""
        if len(self.factors) != 1 or type(self.factors[0]) not in (torch.Tensor, torch.nn.Parameter):
            raise InputError("decoder: this projection is factorised or sparse already; prune in another order")
        return self.factors[0]


@dataclass(frozen=True)
class Blocks:
    """A sublayer's weights group by group, so that what a token uses of them is whole rows next to each other: a copy of the projections'.

    Attributes
    ----------
    inner : tensor (rows, hidden)
        Rows that make a group's features (an MLP's: its gate's and then its up's), one group after the other.
    outer : tensor (features, hidden)
        The weight that takes the features back to the hidden state, transposed.
    edges : tuple of int
        Where the features of each group begin, and the end of the last.
    """

    inner: Tensor
    outer: Tensor
    edges: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.edges) - 1

    @property
    def width(self) -> int:
        """Features of a group; 0 where they differ."""
        features, left = divmod(self.edges[-1], self.groups)
        return 0 if left else features

    def of(self, group: int) -> tuple[Tensor, Tensor]:
        """Both weights of one group: views."""
        rows = len(self.inner) // self.edges[-1]  # a feature: one for a query, two where a gate has its own
        start, stop = self.edges[group : group + 2]
        return self.inner[rows * start : rows * stop], self.outer[start:stop]


@dataclass(frozen=True)
class Attention:
    """An attention sublayer. ``turn`` is the residual projection that width_cross may add, ``router`` the one of a dynamic family.

    ``blocks`` are q and o by KV group, for dynamic width.
    """

    norm: Tensor
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    heads: int
    kv_heads: int
    qk_norms: tuple[Tensor, Tensor] | None = None
    turn: Tensor | None = None
    router: Tensor | None = None
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Mlp:
    """A gated MLP sublayer; ``blocks`` are its weights by groups of channels, for dynamic width."""

    norm: Tensor
    gate: Projection
    up: Projection
    down: Projection
    turn: Tensor | None = None
    router: Tensor | None = None
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Layer:
    """A layer; a sublayer that has been removed is None."""

    attention: Attention | None
    mlp: Mlp | None


@dataclass(frozen=True)
class Dynamic:
    """What is decided while the decoder runs; shares kept are 1 where nothing is.

    Attributes
    ----------
    family : str
        The one dynamic family that is on, or "".
    keep : float
        Share of the tokens, tiles, blocks, prompt or cache that is kept.
    block : int
        sparse_attention: edge of a block.
    start : int
        token: first layer on fewer tokens.
    channel_groups : int
        dynamic_width: groups of MLP channels.
    observed : int
        kv_cache: queries that score the cache.
    seed : int
        Of the number of tokens that run in a decode step.
    """

    family: str = ""
    keep: float = 1.0
    block: int = 64
    start: int = 2
    channel_groups: int = 32
    observed: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Decoder:
    """A decoder ready to run; see :func:`random_decoder`."""

    config: ModelConfig
    dtype: str
    place: str
    embedding: Tensor
    final_norm: Tensor
    head: Tensor
    layers: tuple[Layer, ...]
    theta: float = 10000.0
    epsilon: float = EPSILON
    dynamic: Dynamic = field(default_factory=Dynamic)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.embedding.shape[1])

    def projections(self) -> Iterator[tuple[int, str, Projection]]:
        """Layer number, role and weights of every projection there is."""
        for number, layer in enumerate(self.layers):
            for sublayer, roles in ((layer.attention, ("q", "k", "v", "o")), (layer.mlp, ("gate", "up", "down"))):
                for role in roles if sublayer is not None else ():
                    yield number, role, getattr(sublayer, role)


@dataclass
class Cache:
    """Keys and values of one layer, (batch, kv_heads, room, head_dim) each, of which ``length`` positions are filled."""

    k: Tensor
    v: Tensor
    length: int = 0
    means: Tensor | None = None  # sparse_attention: mean key of each whole block of the prompt


@dataclass
class State:
    """What a prefill leaves for decoding.

    ``caches`` has None where a layer has no attention; ``position`` is that of the next token; ``trace``, where it is a dict, receives what
    dynamic families decided, by layer and sublayer.
    """

    caches: list[Cache | None]
    position: int
    rng: np.random.Generator
    trace: dict[tuple[int, str], Any] | None = None

    def mark(self) -> tuple[int, list[int]]:
        """Where the caches stand, for :meth:`rewind`."""
        return self.position, [cache.length if cache else 0 for cache in self.caches]

    def rewind(self, mark: tuple[int, list[int]]) -> None:
        """Forget tokens decoded since the mark."""
        self.position = mark[0]
        for cache, length in zip(self.caches, mark[1], strict=True):
            if cache is not None:
                cache.length = length


def check_model(config: ModelConfig) -> ModelConfig:
    """The config itself when this decoder can run it, else an InputError that says why not."""
    reasons = {
        "its MLP is not gated": not config.gated,
        f"its norms are {config.norm!r}, not RMS norms": config.norm != "rms",
        "it has no rotary positions over whole heads": config.rotary_dim != config.head_dim
        or config.learned_positions > 0,
        "attention and MLP run in parallel": config.parallel_residual,
        "it has norms after its sublayers": config.post_norms,
        "it soft-caps its logits": config.logit_softcap or config.attention_softcap,
        "some layers attend to a window": any(config.windows),
        "its output projections have biases": config.o_bias or config.mlp_bias,
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise InputError(f"decoder: {config.name} is no Llama-style model: {'; '.join(found)}")
    return config


def random_decoder(
    config: ModelConfig,
    *,
    dtype: str = "bf16",
    place: str = "cpu",
    layers: int | None = None,
    seed: int = 0,
    theta: float = 10000.0,
) -> Decoder:
    """A decoder with random weights of a size that keeps activations near one.

    Parameters
    ----------
    config : simulator.ModelConfig
    dtype : {"fp32", "bf16", "fp16"}
    place : str
        torch device.
    layers : int, optional
        Fewer layers than the model has, where memory or time is short.
    seed : int
    theta : float
        Base of the rotary frequencies.

    Raises
    ------
    InputError
        The model is no Llama-style one.
    """
    check_model(config)
    if dtype not in ("fp32", "bf16", "fp16"):
        raise unknown("dtype of a decoder", dtype, ("fp32", "bf16", "fp16"))
    generator = torch.Generator(device=place).manual_seed(seed)
    kind = TORCH_DTYPE[dtype]

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=place) / math.sqrt(columns)).to(kind)

    def near(value: float, size: int) -> Tensor:
        return (value + 0.1 * torch.randn(size, generator=generator, device=place)).to(kind)

    def dense(rows: int, columns: int, bias: bool = False) -> Projection:
        return Projection((weight(rows, columns),), near(0.0, rows) if bias else None)

    h, q, kv, biased = config.hidden, config.q_width, config.kv_width, config.qkv_bias
    made = []
    for _ in range(config.layers if layers is None else layers):
        norms = (near(1.0, config.head_dim), near(1.0, config.head_dim)) if config.qk_norm else None
        attention = Attention(
            near(1.0, h),
            dense(q, h, biased),
            dense(kv, h, biased),
            dense(kv, h, biased),
            dense(h, q),
            config.heads,
            config.kv_heads,
            norms,
        )
        made.append(
            Layer(attention, Mlp(near(1.0, h), dense(config.inner, h), dense(config.inner, h), dense(h, config.inner)))
        )
    embedding = torch.randn(config.vocab, h, generator=generator, device=place).to(kind)
    head = embedding if config.tied else weight(config.vocab, h)
    return Decoder(config, dtype, place, embedding, near(1.0, h), head, tuple(made), theta)


def from_weights(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: str = "bf16",
    place: str = "cpu",
    theta: float = 10000.0,
    epsilon: float = EPSILON,
) -> Decoder:
    """A decoder with the weights of a Hugging Face checkpoint, by their names there (``model.layers.0.self_attn.q_proj.weight``, ...)."""
    check_model(config)
    kind = TORCH_DTYPE[dtype]

    def get(name: str) -> Tensor:
        if name not in weights:
            raise InputError(f"decoder: the checkpoint of {config.name} has no weight {name!r}")
        return weights[name].to(device=place, dtype=kind)

    def projection(name: str, bias: bool = False) -> Projection:
        return Projection((get(f"{name}.weight"),), get(f"{name}.bias") if bias else None)

    made = []
    for number in range(config.layers):
        at = f"model.layers.{number}"
        norms = (get(f"{at}.self_attn.q_norm.weight"), get(f"{at}.self_attn.k_norm.weight")) if config.qk_norm else None
        q, k, v = (projection(f"{at}.self_attn.{name}_proj", config.qkv_bias) for name in "qkv")
        o = projection(f"{at}.self_attn.o_proj")
        attention = Attention(get(f"{at}.input_layernorm.weight"), q, k, v, o, config.heads, config.kv_heads, norms)
        gate, up, down = (projection(f"{at}.mlp.{name}_proj") for name in ("gate", "up", "down"))
        made.append(Layer(attention, Mlp(get(f"{at}.post_attention_layernorm.weight"), gate, up, down)))
    embedding = get("model.embed_tokens.weight")
    head = embedding if config.tied else get("lm_head.weight")
    return Decoder(config, dtype, place, embedding, get("model.norm.weight"), head, tuple(made), theta, epsilon)
