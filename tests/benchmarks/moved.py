"""Compare the predictions of two versions on a seeded sample of models, GPUs, engines, families,
phases and batches.

Run ``python tests/benchmarks/moved.py write FILE`` in a checkout of each version, then ``python
tests/benchmarks/moved.py compare OLD NEW``: it prints the largest relative difference of every
numeric column and exits with 1 if one is above 1e-9.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import simulator

ROWS, LIMIT = 20_000, 1e-9
DTYPES = {"cpu": "fp32", "t4": "fp16", "v100": "fp16"}


def rows(seed: int = 0) -> list[dict[str, object]]:
    """Return at least ROWS predictions: every draw has all families on three GPUs."""
    rng = np.random.default_rng(seed)
    models, gpus, engines = (
        simulator.list_models(),
        simulator.list_hardware(),
        simulator.list_engines(),
    )
    found: list[dict[str, object]] = []
    while len(found) < ROWS:
        at = {
            "phase": str(rng.choice(["prefill", "decode", "generate", "serve"])),
            "batch": int(2 ** rng.integers(0, 8)),
            "seq": int(2 ** rng.integers(7, 14)),
            "engine": str(rng.choice(engines)),
        }
        model, sparsity = str(rng.choice(models)), round(float(rng.uniform(0.05, 0.8)), 2)
        devices, weights = (
            int(rng.choice([1, 1, 1, 2, 8])),
            [None, None, None, "fp8", "int4"][rng.integers(5)],
        )
        for gpu in rng.choice(gpus, 3, replace=False):
            given = {
                "dtype": DTYPES.get(str(gpu), "bf16"),
                "devices": devices,
                "weight_dtype": weights,
            }
            try:
                table = simulator.table(model, str(gpu), "all", [sparsity, 0.5], **given, **at)
            except simulator.InputError:  # this GPU or engine cannot run the model or the format
                continue
            found += [r.to_dict() for r in table]
    return found[:ROWS]


def compare(old: list[dict[str, object]], new: list[dict[str, object]]) -> float:
    """Print the largest relative difference by column, and return the largest of all; texts must be
    equal."""
    if len(old) != len(new):
        raise SystemExit(f"{len(old)} and {len(new)} rows")
    worst: dict[str, float] = {}
    for a, b in zip(old, new):
        if set(a) != set(b):
            raise SystemExit(f"columns differ: {set(a) ^ set(b)}")
        for name, value in a.items():
            other = b[name]
            if isinstance(value, float) and isinstance(other, float):
                difference = (
                    0.0 if value == other else abs(value - other) / max(abs(value), abs(other))
                )
                worst[name] = max(worst.get(name, 0.0), difference)
            elif value != other and name != "parts":  # a sentence
                raise SystemExit(f"{name}: {value} became {other} in {a}")
    for name, difference in worst.items():
        print(f"{name:24s} {difference:.2g}")
    print(f"{len(old):,} rows, largest relative difference {max(worst.values()):.2g}")
    return max(worst.values())


if __name__ == "__main__":
    if sys.argv[1] == "write":
        Path(sys.argv[2]).write_text("\n".join(json.dumps(row) for row in rows()))
    else:
        first, second = (
            [json.loads(line) for line in Path(f).read_text().splitlines()] for f in sys.argv[2:4]
        )
        sys.exit(compare(first, second) > LIMIT)
