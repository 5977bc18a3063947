"""Compute the taxonomy of pruning families: the shares of M, N and K of some operators that pruning keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from simulator.codes import Kernel
from simulator.workload import Workload

SKIPPED_PAIRS: Mapping[str, str] = MappingProxyType({"dynamic_depth": "M", "dynamic_width": "K"})
"""Axis of the query-key pairs that a family skips, if it is not N: skipped tokens are M, skipped heads are K."""


def kept_axes(
    dense: Workload, pruned: Workload, roles: Sequence[str], attention: str = "N"
) -> tuple[float, float, float]:
    """Return the shares of the logical M, N and K of some operators that pruning keeps, over a whole pass.

    M is the tokens of all layers together, N the outputs of a token, K the multiply-adds of an output. A removed layer
    reduces M; a low-rank pair, or zeros, reduce K; tiles skipped by groups of features reduce N, or K if the features
    are inputs. For attention M is queries, N keys and K the features of all heads; skipped query-key pairs reduce the
    axis named.
    """
    before, after = (w.take(w.is_role(*roles) & ~w.overhead) for w in (dense, pruned))
    if not len(before):
        return (float("nan"),) * 3
    share = float(after.flops.sum() / before.flops.sum())
    if "attention" in roles:
        (m0, k0), (m1, k1) = _queries_features(before), _queries_features(after)
        m, k = m1 / m0, k1 / k0 if k1 else 1.0
        n = share / (m * k)
        return {"N": (m, n, k), "M": (m * n, 1.0, k), "K": (m, 1.0, k * n)}[attention]
    if ((after.kernel == Kernel.GROUPS_N) | (after.kernel == Kernel.GROUPS_K)).any():
        return (1.0, 1.0, share) if set(roles) & {"o", "down"} else (1.0, share, 1.0)
    (m0, n0), (m1, n1) = _tokens_outputs(before), _tokens_outputs(after)
    m, n = m1 / m0, n1 / n0 if n1 else 1.0
    return m, n, share / (m * n) if m * n else 1.0


def _tokens_outputs(w: Workload) -> tuple[float, float]:
    """Return tokens of GEMMs in a pass, and outputs per token; a low-rank pair's second factor makes the output."""
    out = w.stage != 1
    rows = (w.m * w.count)[out]
    return float(rows.sum()), float((rows * w.n[out]).sum() / rows.sum()) if rows.sum() else 0.0


def _queries_features(w: Workload) -> tuple[float, float]:
    """Return queries of attention in a pass, and features per query over all heads."""
    queries = w.batch * w.q_len * w.count
    return float(queries.sum()), float((queries * w.heads * w.head_dim).sum() / queries.sum()) if queries.sum() else 0.0
