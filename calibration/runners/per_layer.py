"""Scores of variants of single layers: what a model loses if one attention or one MLP is replaced, without fine-tuning.

Use :func:`measure_layers`. Its rows are a library of variants (:mod:`simulator.plans.library`).

- Fewer KV heads: the mean of the keys and of the values of the heads that are joined (arXiv 2305.13245), which is how
  Puzzle initialises such a layer. Query heads stay, or those with the largest output weights.
- A narrower MLP: the channels with the largest mean activation times the norm of its output weights, on windows of
  text that are not scored.
- None: the sublayer is removed, with its norm.

A pass continues from the state before the changed sublayer, so only the later layers are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from calibration.devices.operators import gated
from calibration.runners.decoder.model import Attention, Decoder, Layer, Mlp, Projection, Tensor
from calibration.runners.decoder.routed import best
from calibration.runners.decoder.run import PassState, embedded, logits_after, through_layer
from calibration.runners.quality import Score, score_logits
from simulator.errors import InputError
from simulator.files.csv import csv_text, read_csv
from simulator.files.read import read_bounded
from simulator.files.write import write_whole
from simulator.models.config import Block
from simulator.plans.library import Library
from simulator.plans.variants import SUBLAYERS, has, text_of

MOST_LOGIT_BYTES = 2_000_000_000
"""Largest logits of the dense model that stay in memory; larger ones are computed again for each variant."""


@dataclass(frozen=True)
class Change:
    """A variant of one sublayer of a layer."""

    layer: int
    sublayer: str  # "attention" or "mlp"
    text: str
    block: Block

    @property
    def key(self) -> tuple[str, str, str]:
        """Layer, attention and MLP of its row."""
        texts = [self.text if name == self.sublayer else "dense" for name in SUBLAYERS]
        return str(self.layer), texts[0], texts[1]


DENSE = ("all", "dense", "dense")
"""Layer, attention and MLP of the row of the dense model."""


@dataclass(frozen=True)
class LayerScore:
    """Score of a model with one changed sublayer; its fields are the columns of a library."""

    layer: str
    attention: str
    mlp: str
    kl_div: float  # nats per token
    perplexity: float

    @property
    def key(self) -> tuple[str, str, str]:
        """Layer, attention and MLP."""
        return self.layer, self.attention, self.mlp


def changes_of(library: Library) -> list[Change]:
    """Return each variant of each attention and of each MLP in a library, in the order of the layers."""
    found: dict[tuple[int, str, str], Change] = {}
    for layer, (dense, blocks) in enumerate(zip(library.model.layout, library.layers)):
        for name in SUBLAYERS:
            for block in blocks:
                text = text_of(name, block, dense)
                if name in block.linear:
                    raise InputError(f"layer {layer}: {name} linear: needs training; expected sizes or none")
                if text != "dense":
                    found.setdefault((layer, name, text), Change(layer, name, text, block))
    if not found:
        raise InputError(f"{library.model.name}: expected variants other than dense, got none")
    return list(found.values())


def measure_layers(
    decoder: Decoder,
    windows: Sequence[Tensor],
    calibration: Sequence[Tensor],
    changes: Iterable[Change],
    done: Collection[tuple[str, str, str]] = (),
) -> Iterator[LayerScore]:
    """Score the dense model and each change of one sublayer, layer by layer.

    Parameters
    ----------
    decoder : Decoder
        Dense decoder.
    windows : sequence of Tensor
        Scored tokens; all windows are equally long.
    calibration : sequence of Tensor
        Tokens that select channels of MLPs, in windows of the same length.
    changes : iterable of Change
        Variants (:func:`changes_of`), of which several belong to a layer.
    done : collection
        Keys of rows that exist; they are not measured again.

    Yields
    ------
    LayerScore
        First the row of the dense model, which has the key :data:`DENSE`.
    """
    todo: dict[tuple[int, str], list[Change]] = {}
    for change in changes:
        if change.key not in done:
            todo.setdefault((change.layer, change.sublayer), []).append(change)
    if not todo and DENSE in done:
        return
    with torch.no_grad():
        state = PassState(decoder, len(windows[0]))
        scored = embedded(state, torch.stack(list(windows)))
        dense = _Dense(decoder, windows, _rest(state, 0, scored))
        if DENSE not in done:
            yield _row(DENSE, dense.score(dense.last))
        both = embedded(state, torch.stack([*windows, *calibration]))
        many = len(windows)
        for number, layer in enumerate(decoder.layers):
            if not any(at >= number for at, _ in todo):
                return
            for change in todo.get((number, "attention"), ()):
                narrow = replace(layer, attention=_attention(layer.attention, change.block, decoder.head_dim))
                changed = through_layer(state, number, narrow, both[:many])
                yield _row(change.key, dense.score(_rest(state, number + 1, changed)))
            both = through_layer(state, number, replace(layer, mlp=None), both)
            own = todo.get((number, "mlp"), [])
            importance = _importance(state, layer.mlp, both[many:]) if own else None
            for change in own:
                narrow = Layer(None, _mlp(layer.mlp, change.block, importance))
                changed = through_layer(state, number, narrow, both[:many])
                yield _row(change.key, dense.score(_rest(state, number + 1, changed)))
            both = through_layer(state, number, replace(layer, attention=None), both)


def _rest(state: PassState, first: int, x: Tensor) -> Tensor:
    """Return the residual stream after all layers from the one before the layer ``first``."""
    for number, layer in enumerate(state.decoder.layers[first:], first):
        x = through_layer(state, number, layer, x)
    return x


def _row(key: tuple[str, str, str], found: Score) -> LayerScore:
    return LayerScore(*key, found.kl_nats, found.perplexity)


class _Dense:
    """The dense model's predictions of some windows."""

    def __init__(self, decoder: Decoder, windows: Sequence[Tensor], last: Tensor) -> None:
        self.decoder, self.windows, self.last = decoder, windows, last
        size = 4 * last.shape[0] * last.shape[1] * len(decoder.head)
        self.kept = [logits_after(decoder, x) for x in last] if size <= MOST_LOGIT_BYTES else None

    def score(self, last: Tensor) -> Score:
        """Score the residual streams of a changed model."""
        before = self.kept or (logits_after(self.decoder, x) for x in self.last)
        after = (logits_after(self.decoder, x) for x in last)
        return score_logits(zip(before, after, self.windows))


# -- variants ----------------------------------------------------------------------------------------------------------


def _attention(a: Attention | None, block: Block, head_dim: int) -> Attention | None:
    if a is None or not has("attention", block):
        return None
    return fewer_heads(a, block.heads, block.kv_heads, head_dim)


def fewer_heads(a: Attention, heads: int, kv_heads: int, head_dim: int) -> Attention:
    """Return attention with fewer query heads, and fewer KV heads that are means of those of their query heads.

    The query heads with the largest output weights stay: whole groups if their size stays, else equally many of each
    group if this is possible.
    """
    ratio = a.heads // a.kv_heads
    size = a.o.weight.float().pow(2).sum(0).view(a.kv_heads, ratio, head_dim).sum(2)
    number = torch.arange(a.heads, device=size.device).view(a.kv_heads, ratio)
    if heads == ratio * kv_heads:
        kept = number[best(size.sum(1), kv_heads)].flatten()
    elif heads % a.kv_heads == 0:
        kept = number.gather(1, best(size, heads // a.kv_heads)).flatten()
    else:
        kept = best(size.flatten(), heads)
    features = (kept[:, None] * head_dim + torch.arange(head_dim, device=kept.device)).flatten()

    def joined(p: Projection) -> Projection:
        def mean(rows: Tensor) -> Tensor:  # of the KV heads of the query heads in each new group
            by_query = rows.view(a.kv_heads, head_dim, -1)[kept // ratio]
            return by_query.view(kv_heads, -1, *by_query.shape[1:]).mean(1).reshape(kv_heads * head_dim, -1)

        return Projection((mean(p.weight),), None if p.bias is None else mean(p.bias).flatten())

    return replace(
        a, q=a.q.rows(features), k=joined(a.k), v=joined(a.v), o=a.o.columns(features), heads=heads, kv_heads=kv_heads
    )


def _mlp(m: Mlp | None, block: Block, importance: Tensor) -> Mlp | None:
    if m is None or not has("mlp", block):
        return None
    index = best(importance, block.inner)
    return replace(m, gate=m.gate.rows(index), up=m.up.rows(index), down=m.down.columns(index))


def _importance(state: PassState, m: Mlp | None, x: Tensor) -> Tensor:
    """Return the mean output of each channel of an MLP: its mean activation times the norm of its output weights."""
    if m is None:
        return None
    h = state.norm(x, m.norm)
    return gated(m.gate(h), m.up(h)).abs().mean((0, 1)) * m.down.weight.norm(dim=0)


# -- files -------------------------------------------------------------------------------------------------------------


def weights_digest(decoder: Decoder) -> str:
    """Return a digest of the weights of a decoder."""
    found = hashlib.sha256()
    weights = [decoder.embedding, decoder.head, decoder.final_norm]
    weights += [factor for _, _, p in decoder.projections() for factor in p.factors]
    for weight in weights:
        found.update(weight.detach().contiguous().cpu().numpy().data.cast("B"))
    return found.hexdigest()[:8]


def write_scores(path: str | Path, rows: Sequence[LayerScore], protocol: str, source: str) -> None:
    """Write scores as a library (CSV), with the protocol and the source in each row."""
    table = [{**asdict(row), "protocol": protocol, "source": source} for row in rows]
    write_whole(path, csv_text(table).encode())


def read_scores(path: str | Path, protocol: str, source: str) -> list[LayerScore]:
    """Return the scores in a file of :func:`write_scores`; none if it does not exist.

    Raises
    ------
    InputError
        If the file has other columns, or its protocol or source differ.
    """
    if not Path(path).exists():
        return []
    names = [*LayerScore.__dataclass_fields__, "protocol", "source"]
    table, out = read_csv(read_bounded(path), str(path), names), []
    for place, cells in table.records():
        for name, own in (("protocol", protocol), ("source", source)):
            if cells[name] != own:
                raise InputError(f"{place}: {name}: expected {own!r}, got {cells[name]!r}; choose another file")
        try:
            numbers = float(cells["kl_div"]), float(cells["perplexity"])
        except ValueError:
            raise InputError(f"{place}: expected numbers in kl_div and perplexity; choose another file") from None
        out.append(LayerScore(cells["layer"], cells["attention"], cells["mlp"], *numbers))
    return out
