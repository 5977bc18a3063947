"""Keep rows of one measuring method per operator, since methods differ by 8 to 12 % for short kernels.

The method is how launches were timed (graph replays, single launches) and the version of the protocol for CUDA
(:data:`calibration.devices.cuda.PROTOCOL`). Tables of others are not changed: their method is that of the table.
"""

from __future__ import annotations

import numpy as np

from calibration.records.timing_table import LAUNCHES, OPERATORS, Records, Source
from simulator.workload import DTYPES

_WORDS = {"graph": "graph replays", "eager": "single launches"}
OLDEST = "1"
"""Version of the protocol of runs that record none."""


def protocol_of(source: Source) -> str:
    """Return the version of the CUDA protocol that a run of this program followed; "" for other sources."""
    return source.stack.get("protocol", OLDEST) if source.run and "cuda" in source.stack else ""


def one_method(records: Records) -> tuple[Records, tuple[str, ...]]:
    """Return the rows without those whose method differs from most rows of their operator and format, with notes.

    >>> sources = [Source("GPU", {"cuda": "13.0", "protocol": "2"}, run="r")]
    >>> rows = Records.from_columns(sources, m=[1, 2, 3], n=8, k=8, launch=["graph", "graph", "eager"], seconds=1e-6)
    >>> kept, notes = one_method(rows)
    >>> len(kept), notes[0]
    (2, '1 gemm bf16 rows excluded: timed by single launches, the other 2 by graph replays; measure them again')
    """
    r, notes = records, []
    protocols = [protocol_of(source) for source in r.sources]
    own = np.array([bool(source.run) for source in r.sources], dtype=bool)[r.source]
    versions = sorted(set(protocols))
    method = np.stack([r.launch, np.array([versions.index(p) for p in protocols], dtype=np.int64)[r.source]], axis=1)
    kept = np.ones(len(r), dtype=bool)
    for operator, dtype in np.unique(np.stack([r.operator, r.dtype], axis=1)[own], axis=0).tolist():
        rows = own & (r.operator == operator) & (r.dtype == dtype) & r.timed
        found, index, counts = np.unique(method[rows], axis=0, return_inverse=True, return_counts=True)
        if len(found) < 2:
            continue
        # of equally many, those of the newest protocol
        best = max(range(len(found)), key=lambda i: (counts[i], found[i, 1]))
        kept[np.flatnonzero(rows)[index.reshape(-1) != best]] = False
        name = f"{OPERATORS[operator]} {DTYPES[dtype]}"
        words = [_method(launch, version, versions) for launch, version in found.tolist()]
        notes += [
            f"{counts[i]} {name} rows excluded: timed by {words[i]}, the other {counts[best]} by {words[best]}; "
            "measure them again"
            for i in range(len(found))
            if i != best
        ]
    old = np.array([protocol == OLDEST for protocol in protocols], dtype=bool)[r.source] & kept
    if old.any():
        what = "weights may be in L2, and clocks not steady"
        notes.append(f"{int(old.sum())} rows follow protocol {OLDEST} of an older version: {what}; measure again")
    return r.select(kept), tuple(notes)


def _method(launch: int, version: int, versions: list[str]) -> str:
    name = LAUNCHES[launch]
    known = f" (protocol {versions[version]})" if len([v for v in versions if v]) > 1 and versions[version] else ""
    return _WORDS.get(name, f"a method of launches {name!r}") + known
