"""Indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556): scores of every query against the
key of every position, and the selection of the highest scores, without its projections.

A score is the sum over heads of weights times max(0, query x key). Kernels of engines compute the
products in the format of the cached keys (fp8: deepseek-ai/DeepGEMM, pull request 200), write the
scores as fp32, and select in a second kernel, in which one thread block reads the scores of one
query (SGLang: fast_topk). The floor excludes the scores in memory, which a fused kernel avoids
(vLLM, pull request 48726).

No kernel table fits the constants, which were chosen from similar kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import DTYPE_BYTES, Kind
from simulator.operators.attention import entry_pairs
from simulator.operators.base import (
    Cached,
    Calls,
    Device,
    Estimate,
    Estimates,
    Formats,
    Machine,
    Rows,
    RowValues,
    Sizes,
    chained,
    read_constants,
    ready,
)

_CONSTANTS, _ERRORS = read_constants("indexer")
INDEXER_CONSTANTS = _CONSTANTS["indexer"]

SCORE_BYTES = 4.0  # fp32 scores, fp32 weights of heads, int32 positions
SCALE_BYTES = 4.0
"""Bytes of the scale of a cached key below 16 bits: vLLM stores 132 bytes for 128 fp8 features."""


@dataclass(frozen=True)
class IndexerSizes(Sizes):
    """Sizes of indexers: arrays of one shape."""

    batch: FloatArray  # sequences
    q_len: FloatArray  # query positions per sequence, the last of its positions
    kv_len: FloatArray  # positions
    heads: FloatArray
    features: FloatArray  # features of a query or key
    topk: FloatArray  # keys that are selected per query
    ratio: FloatArray  # positions per scored key
    stored: FloatArray  # elements per position in the cache
    key_bytes: Any  # bytes of an element of queries and keys

    @property
    def pairs(self) -> Array:
        """Scores, those of later keys excluded."""
        return self.batch * entry_pairs(self.q_len, self.kv_len, self.ratio)

    @property
    def flops(self) -> Array:
        return 2.0 * self.heads * self.features * self.pairs

    @property
    def position_bytes(self) -> Array:
        """Bytes of a position in the cache."""
        scale = np.where(np.asarray(self.key_bytes) < 2.0, SCALE_BYTES, 0.0)
        return np.asarray(self.stored * (self.key_bytes + scale / self.features))

    @property
    def bytes(self) -> Array:
        """Queries with the weights of their heads, keys, and selected positions, each once."""
        query = self.heads * (self.features * self.key_bytes + SCORE_BYTES)
        query = query + SCORE_BYTES * np.minimum(self.topk, np.floor(self.kv_len / self.ratio))
        return np.asarray(self.batch * (self.q_len * query + self.kv_len * self.position_bytes))


@dataclass(frozen=True)
class IndexerCalls(Calls):
    """Indexers on one device."""

    operator = "indexer"
    sizes: IndexerSizes
    machine: Machine

    def estimate(self, c: RowValues) -> Estimate:
        """Return the cost: products and bytes overlap in part; the selection is added, in which a
        device has as many queries in work as it has SMs."""
        x = self.sizes
        machine = self.machine
        queries = x.batch * x.q_len
        compute = x.flops / (c["e_tc"] * machine.peak_flop_per_s)
        moved = x.bytes + 2.0 * SCORE_BYTES * x.pairs
        memory = moved / (c["e_d"] * machine.bandwidth_bytes_per_s)
        waves = np.maximum(queries / machine.sm_count, 1.0)
        select = waves * SCORE_BYTES * (x.pairs / queries) / c["row_bytes_per_s"]
        bytes_s = x.bytes / machine.bandwidth_bytes_per_s
        flops_s = x.flops / machine.peak_flop_per_s
        position = np.log2(queries), np.log2(x.heads * x.features), np.log2(x.kv_len)
        parts = {"compute": compute, "memory": memory, "latency": select, "launch": c["t0_s"]}
        return chained(self, machine, parts, (bytes_s, flops_s), position)


def indexer(
    sizes: IndexerSizes, hw: Device, dtype: str = "bf16", key_dtype: str = "fp8"
) -> Estimate:
    # products run in the format of the keys where the device computes in it
    machine = Machine.of(hw, key_dtype if key_dtype in hw.rates else dtype)
    return ready(hw, "indexer", dtype).cost(IndexerCalls(sizes, machine))


class Indexer(Cached):
    """Indexers: ``weight_dtype`` is the format of queries and keys."""

    code = int(Kind.INDEXER)
    name = "indexer"
    sizes = ("batch", "q_len", "kv_len", "heads", "head_dim")
    constants = _CONSTANTS
    titles = ("indexers",)
    # no kernel was measured, so priors are wider than those of a prompt's attention
    errors = _ERRORS
    owned_in = "dtype"

    def flops(self, w: Rows) -> Any:
        """2 features per score and head."""
        return _sizes(w).flops

    def bytes(self, w: Rows) -> Any:
        return _sizes(w).bytes

    def cache_bytes(self, w: Rows, sequences: Any, positions: Any) -> Any:
        return sequences * positions * _sizes(w).position_bytes

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        yield slice(None), indexer(_sizes(w), hw, formats.dtype, formats.second)


def _sizes(w: Rows) -> IndexerSizes:
    columns = (w.batch, w.q_len, w.kv_len, w.heads, w.head_dim, w.k, w.n, w.latent)
    names = [f.name for f in fields(IndexerSizes)]
    sizes = (*(column.astype(np.float64) for column in columns), DTYPE_BYTES[w.weight_dtype])
    return IndexerSizes(**dict(zip(names, sizes, strict=True)))
