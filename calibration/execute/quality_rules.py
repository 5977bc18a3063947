"""Rules of dynamic pruning on a real decoder: which tokens, groups, attention blocks or cached positions a pass leaves out."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.execute.quality_model import Decoder, Rule

BLOCK = 64
"""Edge of the attention blocks, as the simulator's family has it unless told otherwise."""

OBSERVED = 64
"""Last queries from which vertical and slash patterns are estimated."""

CHANNEL_GROUPS = 32
"""Groups of MLP channels, as the simulator's family has it unless told otherwise."""

DROP_FROM = 2
"""First layer on fewer prompt tokens, as the simulator's family has it unless told otherwise."""

NEVER = float("-inf")


SINKS = 4
"""First tokens of a window that never skip: later ones rest their attention on them (StreamingLLM, arXiv 2309.17453). On SmolLM2-135M
this halves what skipping 5 % costs."""


class TokenSkipping(Rule):
    """A share of a window's tokens skips each sublayer: those whose residual stream the last sublayer of that kind that they
    computed changed least; the first :data:`SINKS` tokens never do.

    Parameters
    ----------
    share : tensor (layers, 2)
        Share of tokens that skip the attention and the MLP of each layer.
    """

    def __init__(self, share: Tensor) -> None:
        self.share = share
        self.last: dict[str, Tensor] = {}
        self.chosen: Tensor | None = None

    def begin(self, decoder: Decoder, length: int, start: int) -> None:
        self.last = {}

    def tokens(self, layer: int, part: str, x: Tensor) -> Tensor | None:
        many = round(float(self.share[layer, 0 if part == "attention" else 1]) * len(x))
        keep = torch.ones(len(x), dtype=torch.bool)
        known = self.last.get(part)
        if known is None:
            known = torch.arange(
                len(x)
            ).float()  # nothing is known at the first layer: the latest tokens, which fewest others read
        order = known[SINKS:].argsort(descending=True, stable=True)[:many]
        keep[SINKS + order] = False
        self.chosen = keep
        return keep

    def after(self, layer: int, part: str, before: Tensor, x: Tensor) -> None:
        found = torch.cosine_similarity(before, x, dim=-1)
        known = self.last.get(part)
        self.last[part] = found if known is None or self.chosen is None else torch.where(self.chosen, found, known)


class UnitChoice(Rule):
    """In each sublayer the (token, head group) or (token, channel group) pairs of least contribution to the output are left out."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.decoder: Decoder | None = None

    def begin(self, decoder: Decoder, length: int, start: int) -> None:
        self.decoder = decoder

    def heads(self, layer: int, out: Tensor) -> Tensor:
        assert self.decoder is not None
        groups = self.decoder.kv_heads
        parts = out.reshape(len(out), groups, -1)
        weight = self.decoder.layers[layer].o.T.reshape(groups, parts.shape[2], -1)
        size = torch.einsum("tgd,gdh->tgh", parts, weight).norm(dim=-1)
        return (parts * self._kept(size)[..., None]).reshape(out.shape)

    def channels(self, layer: int, h: Tensor) -> Tensor:
        assert self.decoder is not None
        groups = CHANNEL_GROUPS if h.shape[1] % CHANNEL_GROUPS == 0 else 1
        size = (h * self.decoder.layers[layer].down.norm(dim=0)).view(len(h), groups, -1).norm(dim=-1)
        return (h.view(len(h), groups, -1) * self._kept(size)[..., None]).reshape(h.shape)

    def _kept(self, size: Tensor) -> Tensor:
        many = round(self.sparsity * size.numel())
        keep = torch.ones(size.numel(), dtype=torch.bool)
        keep[size.flatten().argsort()[:many]] = False
        return keep.view_as(size)


class AttentionBlocks(Rule):
    """A share of the causal blocks of attention is left out, head by head; the diagonal and the first column of blocks always stay.

    Parameters
    ----------
    sparsity : float
        Share of the blocks left out.
    pattern : {"local", "vertical-slash"}
    """

    def __init__(self, sparsity: float, pattern: str) -> None:
        self.sparsity, self.pattern = sparsity, pattern

    def scores(self, layer: int, scores: Tensor) -> Tensor:
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


class PromptDropping(Rule):
    """Prompt tokens that the last prompt token attends to least, on average over the heads of layer 1, are gone from layer 2 on."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity, self.start = sparsity, 0
        self.gone: Tensor | None = None

    def begin(self, decoder: Decoder, length: int, start: int) -> None:
        self.start, self.gone = start, None

    def tokens(self, layer: int, part: str, x: Tensor) -> Tensor | None:
        return None if self.gone is None or layer < DROP_FROM else ~self.gone

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        if layer == DROP_FROM - 1:
            received = scores[:, self.start - 1, : self.start].softmax(-1).mean(0)
            received[-1] = float("inf")
            self.gone = torch.zeros(scores.shape[-1], dtype=torch.bool)
            self.gone[received.argsort()[: round(self.sparsity * self.start)]] = True
        if self.gone is None or layer < DROP_FROM:
            return scores
        alone = torch.eye(
            len(self.gone), dtype=torch.bool
        )  # a dropped token attends to itself; nothing reads what comes of it
        return scores.masked_fill(self.gone[None, None] & ~alone, NEVER)


class CacheEviction(Rule):
    """After the prompt, the positions of each KV head's cache that stay are the most recent and those with most attention so far."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity, self.start, self.kv_heads = sparsity, 0, 1

    def begin(self, decoder: Decoder, length: int, start: int) -> None:
        self.start, self.kv_heads = start, decoder.kv_heads

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        start, heads = self.start, len(scores)
        kept = max(1, round((1.0 - self.sparsity) * start))
        received = scores[:, :start, :start].softmax(-1).sum(1).view(self.kv_heads, -1, start).sum(1)
        received[:, start - kept // 2 :] = float("inf")
        gone = torch.ones(self.kv_heads, start, dtype=torch.bool).scatter_(1, received.topk(kept, dim=1).indices, False)
        out = scores.clone()
        out[:, start:, :start] = out[:, start:, :start].masked_fill(
            gone.repeat_interleave(heads // self.kv_heads, 0)[:, None], NEVER
        )
        return out
