"""Compare a dense with a pruned model by result files of ``vllm bench``: no vLLM is needed.

Use :func:`simulator.prediction.benchmarks.read_bench` for a file, :func:`simulator.prediction.measured.request_of`
for the request that it measured, and :func:`bench_record` for the record of a pair of files, in the format of
:mod:`calibration.runners.compare`.
"""

from __future__ import annotations

import os
from typing import Any

from calibration.measure.timing import OK
from calibration.runners.cases import Case
from simulator.errors import InputError
from simulator.prediction.benchmarks import BenchRun
from simulator.prediction.measured import pass_seconds


def bench_record(case: Case, dense: BenchRun, pruned: BenchRun) -> dict[str, Any]:
    """Return the record of a case from the files of its dense and its pruned model.

    Samples of two files are not pairs in time: slow changes of the machine between the runs affect the ratio. The
    longer series loses its last samples. InputError: the files differ in what they measured, or from the case.
    """
    for what in ("tool", "concurrency"):
        a, b = getattr(dense, what), getattr(pruned, what)
        if a != b:
            raise InputError(f"{pruned.source}: {what}: expected {a}, as in {dense.source}, got {b}")
    kinds = ("serve",) if dense.kind == "serve" else ("prefill", "generate")
    if case.phase not in kinds:
        raise InputError(f"{dense.source}: phase: expected {' or '.join(kinds)} for {dense.tool}, got {case.phase}")
    for run in (dense, pruned):
        pass_seconds(run, case.phase, case.batch, case.seq, case.dense.meta.new_tokens)
    count = min(len(dense.samples_s), len(pruned.samples_s))
    return {
        "status": OK,
        "reason": "; ".join(dict.fromkeys(run.note for run in (dense, pruned) if run.note)),
        "runtime": dense.tool,
        "loops": 1,
        "dense_s": list(dense.samples_s[:count]),
        "pruned_s": list(pruned.samples_s[:count]),
        "settings": {"dense": _described(dense), "pruned": _described(pruned)},
    }


def _described(run: BenchRun) -> dict[str, Any]:
    return {"file": os.path.basename(run.source), "model": run.model, "percentiles_s": dict(run.percentiles_s)}
