"""Rules of published methods: which tokens, groups, attention blocks or cached positions a pass leaves out.

They compute what a method skips and then leave it out, for one window at a time (a batch of one): they measure quality,
not speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.runners.decoder.model import Attention, Mlp, Sublayer
from calibration.runners.decoder.run import Rule, State

# as the simulator's families have them unless told otherwise: the edge of attention blocks, groups of MLP channels, and
# the first layer on fewer prompt tokens
BLOCK, CHANNEL_GROUPS, DROP_FROM = 64, 32, 2
OBSERVED = 64
"""Last queries from which vertical and slash patterns are estimated."""
SINKS = 4
"""First tokens of a window that never skip: later ones rest their attention on them (StreamingLLM, arXiv 2309.17453).
On SmolLM2-135M this halves what skipping 5 % costs."""
NEVER = float("-inf")


class Masked(Rule):
    """What may be masked: tokens that a sublayer leaves as they are, scores, heads, channels; here nothing."""

    def attention(self, s: State, a: Attention, x: Tensor) -> Tensor:
        return self._masked(s, a, x, super().attention(s, a, x))

    def mlp(self, s: State, m: Mlp, x: Tensor) -> Tensor:
        return self._masked(s, m, x, super().mlp(s, m, x))

    def _masked(self, s: State, part: Sublayer, before: Tensor, x: Tensor) -> Tensor:
        chosen = self.tokens(s, part, before[0])
        if chosen is not None:
            x = torch.where(chosen[:, None], x, before)
        self.after(s, part, before[0], x[0])
        return x

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Each product rounded, as the models' own code does, so that criteria rank ties as it would."""
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    def attend(self, s: State, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share, n = q.shape[1] // k.shape[1], q.shape[2]
        k, v = (t[0].repeat_interleave(share, 0) for t in (k, v))
        scores = q[0] @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), NEVER)
        out = self.scores(s, scores).softmax(-1) @ v
        return self.heads(s, out)[None]

    def tokens(self, s: State, part: Sublayer, x: Tensor) -> Tensor | None:
        """Which tokens compute a sublayer, (tokens,) bool; None for all."""
        return None

    def after(self, s: State, part: Sublayer, before: Tensor, x: Tensor) -> None:
        """Sees the residual stream (tokens, hidden) before and after a sublayer."""

    def scores(self, s: State, scores: Tensor) -> Tensor:
        """May set attention scores (heads, queries, keys) to minus infinity; they are causal already."""
        return scores

    def heads(self, s: State, out: Tensor) -> Tensor:
        """May zero outputs of heads, (heads, tokens, head_dim)."""
        return out


@dataclass(frozen=True)
class TokenSkipping(Masked):
    """A share of a window's tokens skips each sublayer: those whose residual stream the last sublayer of that kind that
    they computed changed least; the first :data:`SINKS` tokens never do. ``share`` (layers, 2) is that of attention and
    MLP of each layer.
    """

    share: Tensor

    def tokens(self, s: State, part: Sublayer, x: Tensor) -> Tensor:
        many = round(float(self.share[s.layer, int(isinstance(part, Mlp))]) * len(x))
        keep = torch.ones(len(x), dtype=torch.bool)
        known = s.kept.get(type(part))
        if known is None:  # nothing is known at the first layer: the latest tokens, which fewest others read
            known = torch.arange(len(x)).float()
        keep[SINKS + known[SINKS:].argsort(descending=True, stable=True)[:many]] = False
        s.kept["chosen"] = keep
        return keep

    def after(self, s: State, part: Sublayer, before: Tensor, x: Tensor) -> None:
        found = torch.cosine_similarity(before, x, dim=-1)
        known = s.kept.get(type(part), found)
        s.kept[type(part)] = torch.where(s.kept["chosen"], found, known)


@dataclass(frozen=True)
class UnitChoice(Masked):
    """In each sublayer the (token, head group) or (token, channel group) pairs of least contribution to the output are
    left out. The choice looks at what the groups would give, so it bounds what a router could reach (contextual
    sparsity, Deja Vu, arXiv 2310.17157)."""

    sparsity: float

    def heads(self, s: State, out: Tensor) -> Tensor:
        a = s.decoder.layers[s.layer].attention
        assert a is not None
        parts = out.transpose(0, 1).reshape(out.shape[1], a.kv_heads, -1)  # (tokens, groups, features)
        weight = a.o.weight.T.reshape(a.kv_heads, parts.shape[2], -1)
        size = torch.einsum("tgd,gdh->tgh", parts, weight).norm(dim=-1)
        return (parts * self._kept(size)[..., None]).view(out.shape[1], len(out), -1).transpose(0, 1)

    def channels(self, s: State, inner: Tensor) -> Tensor:
        m, h = s.decoder.layers[s.layer].mlp, inner[0]
        assert m is not None
        groups = CHANNEL_GROUPS if h.shape[1] % CHANNEL_GROUPS == 0 else 1
        size = (h * m.down.weight.norm(dim=0)).view(len(h), groups, -1).norm(dim=-1)
        return (h.view(len(h), groups, -1) * self._kept(size)[..., None]).view(inner.shape)

    def _kept(self, size: Tensor) -> Tensor:
        keep = torch.ones(size.numel(), dtype=torch.bool)
        keep[size.flatten().argsort()[: round(self.sparsity * size.numel())]] = False
        return keep.view_as(size)


@dataclass(frozen=True)
class AttentionBlocks(Masked):
    """A share of each head's causal blocks of attention is left out; the diagonal and the first column always stay.

    ``pattern`` is "local", the nearest blocks (A-shape, StreamingLLM, arXiv 2309.17453), or "vertical-slash", those on
    the columns and diagonals that the last queries attend to most (MInference, arXiv 2407.02490).
    """

    sparsity: float
    pattern: str

    def scores(self, s: State, scores: Tensor) -> Tensor:
        heads, n, _ = scores.shape
        blocks = -(-n // BLOCK)
        row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
        near = (column - row).float().expand(heads, -1, -1).clone()
        rank = near if self.pattern == "local" else self._vertical_slash(scores, blocks)
        rank[:, (row == column) | (column == 0)] = float("inf")
        causal = (column <= row).flatten()
        keep = round((1.0 - self.sparsity) * int(causal.sum()))
        order = rank.flatten(1)[:, causal].argsort(dim=1, descending=True, stable=True)[:, : max(keep, 2 * blocks - 1)]
        inside = torch.zeros(heads, int(causal.sum()), dtype=torch.bool).scatter_(1, order, True)
        mask = torch.zeros(heads, blocks * blocks, dtype=torch.bool)
        mask[:, causal] = inside
        wide = mask.view(heads, blocks, blocks).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :n, :n]
        return scores.masked_fill(~wide, NEVER)

    def _vertical_slash(self, scores: Tensor, blocks: int) -> Tensor:
        heads, n, _ = scores.shape
        seen = scores[:, -OBSERVED:].softmax(-1)
        query = torch.arange(n - seen.shape[1], n)
        vertical = torch.zeros(heads, blocks).index_add_(1, torch.arange(n) // BLOCK, seen.sum(1))
        behind = ((query[:, None] - torch.arange(n)[None]).clamp_min(0) // BLOCK).flatten()
        slash = torch.zeros(heads, blocks).index_add_(1, behind, seen.flatten(1))
        offset = (torch.arange(blocks)[:, None] - torch.arange(blocks)[None]).clamp_min(0)
        return vertical[:, None, :] + slash[:, offset]


@dataclass(frozen=True)
class PromptDropping(Masked):
    """Prompt tokens that the last one attends to least, on average over the heads of layer 1, are gone from layer 2 on
    (FastV, arXiv 2403.06764)."""

    sparsity: float

    def tokens(self, s: State, part: Sublayer, x: Tensor) -> Tensor | None:
        return ~s.kept["gone"] if s.layer >= DROP_FROM and "gone" in s.kept else None

    def scores(self, s: State, scores: Tensor) -> Tensor:
        if s.layer == DROP_FROM - 1:
            received = scores[:, s.prompt - 1, : s.prompt].softmax(-1).mean(0)
            received[-1] = float("inf")
            s.kept["gone"] = torch.zeros(scores.shape[-1], dtype=torch.bool)
            s.kept["gone"][received.argsort()[: round(self.sparsity * s.prompt)]] = True
        if s.layer < DROP_FROM or "gone" not in s.kept:
            return scores
        # a dropped token attends to itself; nothing reads what comes of it
        alone = torch.eye(scores.shape[-1], dtype=torch.bool)
        return scores.masked_fill(s.kept["gone"][None, None] & ~alone, NEVER)


@dataclass(frozen=True)
class CacheEviction(Masked):
    """After the prompt, the positions of each KV head's cache that stay are the most recent and those with most
    attention so far, half and half (H2O, arXiv 2306.14048)."""

    sparsity: float

    def scores(self, s: State, scores: Tensor) -> Tensor:
        a, prompt = s.decoder.layers[s.layer].attention, s.prompt
        assert a is not None
        kept = max(1, round((1.0 - self.sparsity) * prompt))
        received = scores[:, :prompt, :prompt].softmax(-1).sum(1).view(a.kv_heads, -1, prompt).sum(1)
        received[:, prompt - kept // 2 :] = float("inf")
        gone = torch.ones(a.kv_heads, prompt, dtype=torch.bool)
        gone.scatter_(1, received.topk(kept, dim=1).indices, False)
        out = scores.clone()
        each = gone.repeat_interleave(len(scores) // a.kv_heads, 0)[:, None]
        out[:, prompt:, :prompt] = out[:, prompt:, :prompt].masked_fill(each, NEVER)
        return out
