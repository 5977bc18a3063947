"""A dense decoder in float64 without a cache whose removed parts are masked: pruned passes must
equal its results."""

from __future__ import annotations

from typing import Any

import shaped
import torch

from calibration.runners.decoder.model import Decoder, decode, prefill

LAYERS, BATCH, PROMPT, STEPS = 4, 3, 70, 3
LAYER = shaped.layer(8, 4, 160, 12)
CONFIG = shaped.model_of(*[LAYER] * LAYERS, hidden=96, vocab=211, max_positions=512)
TOKENS = torch.randint(
    CONFIG.vocab, (BATCH, PROMPT + STEPS), generator=torch.Generator().manual_seed(7)
)
ALL = slice(None)

Masks = dict[tuple[str, int], Any]
"""Parts that a dense pass omits to equal a pruned one, by name and layer.

"seen" (batch, kv_heads, queries, keys); "groups" (batch, tokens, kv_heads) and "channels" (batch,
tokens, inner) used; "attention" and "mlp" (batch, tokens) computed.
"""


def _norm(x: Any, weight: Any, epsilon: float) -> Any:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def _turn(x: Any, theta: float) -> Any:
    """Rotary embedding as complex numbers: features i and i + d/2 are one."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat((turned.real, turned.imag), -1)


def _linear(projection: Any, x: Any) -> Any:
    weight = projection.factors[0].double()
    for factor in projection.factors[1:]:
        weight = factor.double() @ weight
    y = x @ weight.t()
    return y if projection.bias is None else y + projection.bias.double()


def reference(decoder: Decoder, tokens: Any, masks: Masks | None = None) -> Any:
    """Logits at every position, (batch, tokens, vocab), all positions at once, no cache."""
    masks = masks or {}
    x = decoder.embedding.double()[tokens]
    batch, length = tokens.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for number, one in enumerate(decoder.layers):
        if (a := one.attention) is not None:
            h = _norm(x, a.norm, decoder.epsilon)
            wanted = ((a.q, a.heads), (a.k, a.kv_heads), (a.v, a.kv_heads))
            q, k, v = (
                _linear(p, h).view(batch, length, heads, -1).transpose(1, 2) for p, heads in wanted
            )
            if a.q_norm is not None:
                q, k = _norm(q, a.q_norm, decoder.epsilon), _norm(k, a.k_norm, decoder.epsilon)
            q, k = _turn(q, 10000.0), _turn(k, 10000.0)
            group = a.heads // a.kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            seen = (
                causal & masks["seen", number].repeat_interleave(group, 1)
                if ("seen", number) in masks
                else causal
            )
            out = ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).masked_fill(
                ~seen, -torch.inf
            ).softmax(-1) @ v
            if ("groups", number) in masks:
                out = (
                    out
                    * masks["groups", number].transpose(1, 2).repeat_interleave(group, 1)[..., None]
                )
            y = _linear(a.o, out.transpose(1, 2).flatten(2))
            if ("attention", number) in masks:
                y = y * masks["attention", number][..., None]
            x = x + y
        if (m := one.mlp) is not None:
            h = _norm(x, m.norm, decoder.epsilon)
            gate = _linear(m.gate, h)
            middle = gate * torch.sigmoid(gate) * _linear(m.up, h)
            if ("channels", number) in masks:
                middle = middle * masks["channels", number]
            y = _linear(m.down, middle)
            if ("mlp", number) in masks:
                y = y * masks["mlp", number][..., None]
            x = x + y
    return _norm(x, decoder.final_norm, decoder.epsilon) @ decoder.head.double().t()


def run(decoder: Decoder, tokens: Any = TOKENS, prompt: int = PROMPT) -> Any:
    """Return the logits of the last prompt position and of each decode step, (batch, 1 + steps,
    vocab)."""
    logits, state = prefill(decoder, tokens[:, :prompt], room=tokens.shape[1] - prompt)
    out = [logits, *(decode(decoder, one[:, None], state) for one in tokens[:, prompt:].unbind(1))]
    assert state.position == tokens.shape[1]
    return torch.stack(out, 1)


def check(logits: Any, expected: Any, prompt: int = PROMPT, tolerance: float = 2e-3) -> None:
    torch.testing.assert_close(
        logits.double(), expected[:, prompt - 1 :], rtol=tolerance, atol=tolerance
    )
    # a check that cannot fail is none: other positions must differ
    assert not torch.allclose(
        logits.double()[:, 0], expected[:, prompt - 3], rtol=tolerance, atol=tolerance
    )


def layout_mask(table: Any, q_len: int, kv_len: int, block: int) -> Any:
    """Return the boolean mask (q_len, kv_len) of a layout; dense attention with it gives the same
    result."""
    mask = table.repeat_interleave(block, 0).repeat_interleave(block, 1)[:q_len, :kv_len]
    return mask & torch.ones(q_len, kv_len, dtype=torch.bool, device=table.device).tril(
        kv_len - q_len
    )
