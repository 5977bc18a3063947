"""Cache pruning: evict part of the prompt's keys and values after the prefill (H2O, SnapKV,
PyramidKV)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arguments import flag
from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, Kind, Phase
from simulator.pruning._family import SCORE_BYTES, Choice, Family, removed, whole
from simulator.pruning.dynamic.rows import (
    Inserted,
    changed,
    insert,
    overheads,
    prompt_of,
    shorter_copies,
    whole_share,
)
from simulator.workload import Workload


def kv_cache(
    w: Workload,
    choice: Choice,
    *,
    ideal: bool,
    observed: int = 32,
    budget: Any = None,
    rolling: bool = False,
) -> tuple[Workload, float]:
    """Keep ``round((1-s) S)`` of the S prompt positions in the cache, at least one, and all
    generated positions.

    With ``budget``, keep at most that many prompt positions. With ``rolling``, a generated position
    replaces an older one: the cache never holds more positions than it keeps of the prompt (or than
    ``budget``). At the end of the prefill, the last ``observed`` queries score all keys (``mask``),
    each KV head selects positions (``select``), and the cache is compacted (``gather``). With
    ``observed`` 0, the place of a position alone decides."""
    observed, rolling, prompt = (
        whole("observed", observed, low=0),
        flag("option rolling", rolling),
        prompt_of(w),
    )
    if budget is None:
        share = choice.rows(w)
        pruned, most = share > 0, np.maximum(whole_share(1.0 - share, prompt), 1)
    else:
        most = np.full(len(w), whole("budget", budget))
        pruned = prompt > most
    out, kept, realised = evict(w, most, pruned, rolling, everywhere=budget is not None)
    prefill = w.kind == Kind.PREFILL_ATTENTION
    at = np.flatnonzero(prefill & pruned & (w.kv_len >= prompt))  # the last chunk of a prompt
    if ideal or not len(at):
        return out, realised
    return insert(out, _selection(w, at, kept[at], observed)), realised


def _selection(w: Workload, at: Array, left: Array, observed: int) -> Inserted:
    """Return the rows that score, select and copy the positions ``left`` in the cache, after the
    attention rows ``at``."""
    latent = w.latent[at]  # one vector for all heads, counted half as key and half as value
    keys, heads = w.kv_len[at], w.batch[at] * np.where(latent > 0, 1, w.kv_heads[at])
    features = np.where(latent > 0, latent / 2, w.head_dim[at])
    # bytes of one key, all sequences and heads
    position = heads * features * DTYPE_BYTES[w.weight_dtype[at]]
    queries = w.batch[at] * w.heads[at] * np.minimum(observed, w.q_len[at])
    scores, chosen = queries * keys * SCORE_BYTES, SCORE_BYTES * heads
    traffic = {
        "mask": (queries, keys, position * keys + scores, scores),
        "select": (heads, keys, chosen * keys, chosen * left),
        "gather": (heads * left, 2 * features, position * 2.0 * left, position * 2.0 * left),
    }
    return [
        (at + 0.5, overheads(w, at, role, m=m, n=n, read_bytes=read, write_bytes=write))
        for role, (m, n, read, write) in traffic.items()
        if observed or role == "gather"
    ]


def evict(
    w: Workload, most: Array, pruned: Array, rolling: bool, *, everywhere: bool
) -> tuple[Workload, Array, float]:
    """Return the workload with at most ``most`` positions of the prompt in the cache of ``pruned``
    rows, the positions that each row keeps, and the evicted share. With ``rolling``, decoding adds
    no position to these rows, or to any row if ``everywhere``."""
    prompt = prompt_of(w)
    kept = np.minimum(most, prompt)
    evicted = np.where(pruned, prompt - kept, 0)
    length = w.kv_len - evicted
    if rolling:
        length = np.where(pruned | everywhere, np.minimum(length, most), length)
    shorter = w.attends & (w.phase == Phase.DECODE)
    out = shorter_copies(w, changed(w, shorter, kv_len=length))
    decode, prefill = w.kind == Kind.DECODE_ATTENTION, w.kind == Kind.PREFILL_ATTENTION
    rows = prefill if prefill.any() else decode
    before, after = (float(x[rows] @ w.count[rows]) for x in (prompt, prompt - evicted))
    return out, kept, removed(before, after)


FAMILY = Family(
    function=kv_cache,
    axis="K of decode attention",
    loading="kernels",
    parts={},
    order=11,
    together="equal length",
    summary="keeps a share of the prompt's cache, or a budget of positions",
    support=("decode", "generate", "serve"),
)
