"""One decoder layer as Hugging Face Transformers runs it eagerly, to time the host: modules, views and dispatch.

The operations and their order are those of ``LlamaDecoderLayer`` in Transformers with "sdpa" attention, for one new
token of one sequence. The layer is so small that every device is faster than its host; its results are not used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = Any  # torch.Tensor; torch is optional, so its types are not relied upon

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 64, 4, 2, 16, 128
LAYERS = 8
"""Layers launched in sequence, as in a pass; each has separate modules, weights and cache."""

_EPSILON = 1e-5


class Norm(nn.Module):  # type: ignore[misc]
    """A root-mean-square norm of eight operations, with the square in fp32."""

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, **options))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., features) to the same shape."""
        given = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + _EPSILON)
        return self.weight * hidden.to(given)


class EagerCache:
    """Keys and values of earlier positions; an update returns them with the new ones, without storing the new ones."""

    def __init__(self, kv_len: int, **options: Any) -> None:
        self.keys, self.values = torch.randn((2, 1, KV_HEADS, kv_len - 1, HEAD_DIM), **options)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values, (1, KV heads, kv_len, head_dim) each."""
        return torch.cat((self.keys, keys), dim=-2), torch.cat((self.values, values), dim=-2)


def rotate_half(x: Tensor) -> Tensor:
    """Swap the halves of the last axis and negate the second half."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (1, heads, tokens, head_dim) by angles (1, tokens, head_dim)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def repeated(x: Tensor, times: int) -> Tensor:
    """Repeat each KV head of (1, heads, positions, head_dim) ``times`` times."""
    batch, heads, positions, width = x.shape
    return x[:, :, None].expand(batch, heads, times, positions, width).reshape(batch, heads * times, positions, width)


class EagerAttention(nn.Module):  # type: ignore[misc]
    """Separate projections, rotation, cache, repeated KV heads, scaled dot product."""

    def __init__(self, kv_len: int, **options: Any) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False, **options)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False, **options)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False, **options)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False, **options)
        self.cache = EagerCache(kv_len, **options)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Map (1, tokens, hidden) to the same shape."""
        before = hidden.shape[:-1]
        shape = (*before, -1, HEAD_DIM)
        q = self.q_proj(hidden).view(shape).transpose(1, 2)
        k = self.k_proj(hidden).view(shape).transpose(1, 2)
        v = self.v_proj(hidden).view(shape).transpose(1, 2)
        q, k = rotated(q, k, *angles)
        k, v = self.cache.update(k, v)
        k, v = repeated(k, HEADS // KV_HEADS), repeated(v, HEADS // KV_HEADS)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=HEAD_DIM**-0.5)
        return self.o_proj(out.transpose(1, 2).contiguous().reshape(*before, -1).contiguous())


class EagerMlp(nn.Module):  # type: ignore[misc]
    """Gate, up, silu, product, down."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False, **options)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False, **options)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False, **options)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (1, tokens, hidden) to the same shape."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class EagerLayer(nn.Module):  # type: ignore[misc]
    """A layer with a cache of ``kv_len`` positions, including the new one."""

    def __init__(self, kv_len: int, **options: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = EagerAttention(kv_len, **options), EagerMlp(**options)
        self.input_layernorm, self.post_attention_layernorm = Norm(HIDDEN, **options), Norm(HIDDEN, **options)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Map (1, tokens, hidden) to the same shape; ``angles`` are cosines and sines (1, tokens, head_dim)."""
        residual = hidden
        hidden = residual + self.self_attn(self.input_layernorm(hidden), angles)
        residual = hidden
        return residual + self.mlp(self.post_attention_layernorm(hidden))
