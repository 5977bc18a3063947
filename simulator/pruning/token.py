"""Token pruning: prompt tokens are dropped from a layer on, and from the cache (FastV, PyramidDrop, LazyLLM, LLMLingua at layer 0)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError
from simulator.pruning._common import (
    SCORE_BYTES,
    Choice,
    Family,
    attention_rows,
    insert,
    layer_count,
    merge_runs,
    one_of,
    overheads,
    removed,
    split_at,
    sublayer_ends,
    sublayer_starts,
    whole,
    whole_share,
)
from simulator.pruning._tokens import prompt_of
from simulator.workload import DTYPE_BYTES, Kind, Part, Phase, Workload

START = 2
"""First layer on fewer tokens unless told otherwise; early layers are where dropping hurts most (FastV drops after layer 2)."""


def token(w: Workload, choice: Choice, *, ideal: bool, start: Any, mode: str) -> tuple[Workload, float]:
    """From layer ``start`` (default 2) on, ``round((1-s) S)`` of the S prompt tokens remain, at least one, and only they are cached.

    A per-layer sparsity is the share of the prompt missing in each layer; it never falls from one layer to the next. Where logits of all
    positions are asked for, only tokens that remain have some. In decode the cache alone is shorter.
    Cost, at each layer where tokens go: ``mode`` "dynamic" scores them by the last query's attention (``select``) and gathers the rest;
    "static" (chosen before inference: pooling, stop words) only gathers. Realised: prompt tokens dropped / prompt tokens, at the last layer
    (mean over the layers for a per-layer sparsity).
    """
    one_of("mode", mode, ("dynamic", "static"))
    layers, per_layer = layer_count(w), choice.form == "layer"
    first = 0 if per_layer else min(START, layers - 1)
    if start is not None:
        if per_layer:
            raise InputError("option start: a sparsity by layer says already where tokens go")
        first = whole("start", start, low=0)
        if first >= layers:
            raise InputError(f"option start: expected a layer from 0 to {layers - 1}, got {start!r}")
    wide = w if per_layer else split_at(w, first)
    table = np.zeros(layers)
    if per_layer:
        inside = wide.layer >= 0
        table[wide.layer[inside]] = choice.rows[inside]
    else:
        table[first:] = choice.asked
    if (np.diff(table) < 0).any():
        at = int(np.flatnonzero(np.diff(table) < 0)[0]) + 1
        low = f"expected at least {table[at - 1]:g}, got {table[at]:g}"
        raise InputError(f"sparsity of layer {at}: a dropped token cannot come back; {low}")
    out, kept, prompt = _dropped(wide, table)
    if not ideal:
        out = _with_selection(wide, out, table, kept, prompt, mode)
    share = kept / np.maximum(prompt, 1)
    covers = [
        (wide.layer <= i) & (wide.layer + wide.layers > i) for i in (range(layers) if per_layer else (layers - 1,))
    ]
    layer_share = [removed(1.0, float(share[rows][0])) for rows in covers]
    return merge_runs(out), float(np.mean(layer_share))


def _dropped(w: Workload, table: Array) -> tuple[Workload, Array, Array]:
    """The workload on fewer tokens, and prompt tokens left and there before, by row."""
    s = np.where(w.layer >= 0, table[np.maximum(w.layer, 0)], np.where(w.part == Part.HEAD, table[-1], 0.0))
    prompt = prompt_of(w)
    prompt = np.where(
        prompt > 0, prompt, int(prompt.max(initial=0)) or w.meta.seq
    )  # outside the layers, or in layers without attention
    kept = np.where(s > 0, np.maximum(whole_share(1.0 - s, prompt), 1), prompt)
    prefill = (w.phase == Phase.PREFILL) & (s > 0)
    sampled = (w.layer < 0) & (w.m <= w.meta.batch)  # the head on last positions
    fewer = prefill & ~sampled & (w.m > 0)
    m = np.where(fewer, np.maximum(w.m * kept // np.maximum(prompt, 1), 1), w.m)
    share = np.where(fewer, m / np.maximum(w.m, 1), 1.0)
    gone = prompt - kept
    queries = w.kind == Kind.PREFILL_ATTENTION
    q_len = np.where(queries, np.maximum(w.q_len - gone, 1), w.q_len)
    kv_len = np.where(attention_rows(w), np.maximum(w.kv_len - gone, 1), w.kv_len)
    out = w.replace(m=m, read_bytes=w.read_bytes * share, write_bytes=w.write_bytes * share, q_len=q_len, kv_len=kv_len)
    return out, kept, prompt


def _with_selection(w: Workload, out: Workload, table: Array, kept: Array, prompt: Array, mode: str) -> Workload:
    steps = np.flatnonzero(np.diff(table, prepend=0.0) > 0)  # layers before which tokens go
    rows = np.flatnonzero((w.kind == Kind.PREFILL_ATTENTION) & np.isin(w.layer, steps))
    if not len(rows):
        return out
    place = sublayer_starts(w, rows) - 0.5
    missing = np.r_[0.0, table][w.layer[rows]]  # share of the prompt gone in the layer before
    before = np.maximum(whole_share(1.0 - missing, prompt[rows]), 1)
    hidden = int(w.n[sublayer_ends(w)].max())
    left = w.batch[rows] * kept[rows]
    moved, index = left * hidden * DTYPE_BYTES[w.dtype[rows]], left * SCORE_BYTES
    parts = []
    once: dict[str, Any] = {
        "layers": np.ones(len(rows)),
        "count": w.count[rows] / np.maximum(w.layers[rows], 1),
    }  # in one layer only
    if mode == "dynamic":
        scores = w.batch[rows] * before * w.heads[rows] * SCORE_BYTES
        select = overheads(
            w, rows, "select", m=w.batch[rows] * before, n=w.heads[rows], read_bytes=scores, write_bytes=index, **once
        )
        parts.append((place, select))
    parts.append(
        (place, overheads(w, rows, "gather", m=left, n=hidden, read_bytes=moved + index, write_bytes=moved, **once))
    )
    return insert(out, parts)


FAMILY = Family(
    name="token",
    axis="static or dynamic M",
    dynamic=True,
    order=10,
    function=token,
    summary="prompt tokens dropped from a layer on, and from the cache",
    cost="scoring and gathering of the tokens where they are dropped",
    realised="prompt tokens dropped / prompt tokens, from the layer on",
    options={"start": None, "mode": "dynamic"},
)
