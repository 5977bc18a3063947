"""Sweeps of 10,000 to a million configurations, timed: ``python tests/benchmarks/scale.py --figure scale.pdf``."""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

from simulator.prediction.grid import Grid
from simulator.prediction.sweep import Summary, write_sweep

BATCHES, SEQS = tuple(2**i for i in range(8)), tuple(2**i for i in range(7, 15))


def grid(size: int) -> Grid:
    """About so many configurations: 11 families on three devices in two engines, prefill and decode."""
    models = ("llama-3.1-8b",) if size < 10**6 else ("llama-3.1-8b", "qwen3-8b", "llama-2-13b", "mistral-7b-v0.3")
    sparsities, seqs = {
        10**4: ((0.25, 0.5), SEQS[:5]),
        10**5: (tuple(round(0.08 * i, 2) for i in range(1, 13)), SEQS),
        10**6: (tuple(round(0.03 * i, 2) for i in range(1, 31)), SEQS),
    }[size]
    hardware = ("a100_sxm_80gb", "h100_sxm", "rtx_4090")
    return Grid(models, hardware, sparsities, ("prefill", "decode"), BATCHES, seqs, engines=("reference", "hf"))


def megabytes() -> float:
    """Largest resident memory so far: this process, and twice that of its largest worker."""
    own, workers = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own + 2.0 * workers


def main() -> None:
    """Run the three sizes, print a line each, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    done: list[Summary] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (10**4, 10**5, 10**6):
            done.append(write_sweep(grid(size), Path(folder) / str(size), jobs=options.jobs))
            s = done[-1]
            each = 1e6 * s.seconds / s.configurations
            what = f"{s.configurations:>9,} configurations, {s.rows:>9,} rows"
            print(f"{what}: {s.seconds:6.1f} s, {each:5.1f} us each, at most {megabytes():.0f} MB so far")
    if options.figure:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
        axes.loglog([s.configurations for s in done], [s.seconds for s in done], "o-")
        axes.set(xlabel="configurations", ylabel="seconds", title=f"prunesim sweep, {options.jobs} processes")
        figure.savefig(options.figure)


if __name__ == "__main__":
    main()
