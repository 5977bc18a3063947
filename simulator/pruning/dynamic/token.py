"""Token pruning: drop prompt tokens from some layer on, and from the cache (FastV, PyramidDrop,
LLMLingua)."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, Kind, Part, Phase
from simulator.errors import InputError
from simulator.pruning._family import SCORE_BYTES, Choice, Family, one_of, whole
from simulator.pruning.dynamic import rows as _rows
from simulator.workload import Workload

# default of the first layer with fewer tokens (FastV drops after layer 2); early layers need all
# tokens most
START = 2


def token(
    w: Workload, choice: Choice, *, ideal: bool, start: Any = None, mode: str = "dynamic"
) -> tuple[Workload, float]:
    """Keep ``round((1-s) S)`` of S prompt tokens, at least 1, from layer ``start`` (default 2) on,
    also in the cache.

    A sparsity per layer is the share of the prompt that is missing in each layer; it must not
    decrease with depth. ``mode`` "dynamic" scores tokens by the attention of the last query
    (``select``) and gathers the rest; "static" only gathers. The realised sparsity is the share of
    the last layer, or the mean over layers."""
    one_of("mode", mode, ("dynamic", "static"))
    layers, per_layer = _rows.layer_count(w), choice.form == "layer"
    table = np.zeros(layers)  # share of the prompt that is missing in each layer
    if per_layer:
        if start is not None:
            raise InputError(
                "option start: expected no start with a sparsity by layer, which defines it"
            )
        table = choice.fractions
        if (np.diff(table) < 0).any():
            at = int(np.flatnonzero(np.diff(table) < 0)[0]) + 1
            expected = f"expected at least {table[at - 1]:g}, as dropped tokens do not return"
            raise InputError(f"sparsity of layer {at}: {expected}, got {table[at]:g}")
    else:
        first = min(START, layers - 1) if start is None else whole("start", start, low=0)
        if first >= layers:
            raise InputError(
                f"option start: expected a layer from 0 to {layers - 1}, got {start!r}"
            )
        table[first:] = choice.asked
        w = _rows.split_at(w, first)
    out, share = drop_tokens(w, table)
    if not ideal:
        out = _with_selection(w, out, table, share, mode)
    counted = range(layers) if per_layer else (layers - 1,)
    dropped = [1.0 - share[(w.layer <= i) & (w.layer + w.layers > i)][0] for i in counted]
    return _rows.merge_runs(out), float(np.mean(dropped))


def drop_tokens(w: Workload, table: Array) -> tuple[Workload, Array]:
    """Return the workload with fewer tokens, and the share of prompt tokens that each row keeps."""
    s = np.where(
        w.layer >= 0, table[np.maximum(w.layer, 0)], np.where(w.part == Part.HEAD, table[-1], 0.0)
    )
    prompt = _rows.prompt_of(w)
    # outside the layers, and in layers without attention, the prompt has its full length
    prompt = np.where(prompt > 0, prompt, int(prompt.max(initial=0)) or w.meta.seq)
    kept = np.where(s > 0, np.maximum(_rows.whole_share(1.0 - s, prompt), 1), prompt)
    begins, norms = w.is_role("embedding"), w.is_role("final_norm")
    ends = w.m[norms if norms.sum() == begins.sum() else begins]  # tokens at the end of each pass
    # the head computes all positions, or only the last of each prompt
    few = w.m < np.r_[w.m.max(initial=0), ends][np.cumsum(begins)]
    sampled = w.is_role("lm_head", "all_gather", "softcap") & few
    fewer = (w.phase == Phase.PREFILL) & (s > 0) & ~sampled & (w.m > 0)
    m = np.where(fewer, np.maximum(w.m * kept // prompt, 1), w.m)
    prefill, share = w.attends & (w.phase == Phase.PREFILL), kept / prompt
    q_len, kv_len = (  # in the prefill, the same share of each chunk of a prompt
        np.where(
            prefill,
            np.maximum(_rows.whole_share(share, length), 1),
            np.maximum(length - (prompt - kept), 1),
        )
        for length in (w.q_len, w.kv_len)
    )
    out = _rows.shorter_copies(w, _rows.changed(w, w.attends, q_len=q_len, kv_len=kv_len))
    return out.replace(m=m, **_rows.moved(out, np.where(fewer, m / np.maximum(w.m, 1), 1.0))), share


def _with_selection(w: Workload, out: Workload, table: Array, share: Array, mode: str) -> Workload:
    """Return ``out`` with the rows that score and gather tokens; they run once per layer that drops
    tokens."""
    # layers before which tokens are dropped
    steps = np.flatnonzero(np.diff(table, prepend=0.0) > 0)
    rows = np.flatnonzero((w.kind == Kind.PREFILL_ATTENTION) & np.isin(w.layer, steps))
    if not len(rows):
        return out
    x, place = w.take(rows), _rows.before_sublayer(w, rows)
    missing = np.r_[0.0, table][x.layer]  # share of the prompt missing in the previous layer
    before = x.batch * np.maximum(_rows.whole_share(1.0 - missing, x.q_len), 1)
    left = x.batch * np.maximum(_rows.whole_share(share[rows], x.q_len), 1)
    hidden = int(_rows.hidden_at(w, np.flatnonzero(_rows.sublayer_ends(w))).max())
    stream, scores, index = (
        left * hidden * DTYPE_BYTES[x.dtype],
        before * x.heads * SCORE_BYTES,
        left * SCORE_BYTES,
    )
    once = {"layers": np.ones(len(rows)), "count": x.count / np.maximum(x.layers, 1)}
    traffic: dict[str, Any] = {
        "select": {"m": before, "n": x.heads, "read_bytes": scores, "write_bytes": index},
        "gather": {"m": left, "n": hidden, "read_bytes": stream + index, "write_bytes": stream},
    }
    roles = ("select", "gather") if mode == "dynamic" else ("gather",)
    return _rows.insert(
        out, [(place, _rows.overheads(w, rows, role, **traffic[role], **once)) for role in roles]
    )


FAMILY = Family(
    function=token,
    axis="static or dynamic M",
    loading="kernels",
    parts={},
    order=10,
    together="equal length",
    summary="drops prompt tokens from some layer on, also from the cache",
)
