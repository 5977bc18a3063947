"""The fastest pruning of a cell is the fastest of the table; it is certain if the interval of its
ratio to the second is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import simulator
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import against
from simulator.prediction.pareto import winners
from simulator.prediction.prunings import Pruning
from simulator.request import Request

SHAPES = tuple(itertools.product((1, 8, 64), (512, 4096)))
MODEL = "llama-3.1-8b"


def requests(phase: str) -> list[Request]:
    return [Request(model=MODEL, phase=phase, batch=batch, seq=seq) for batch, seq in SHAPES]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_winner_is_that_of_the_table_and_certain_by_the_interval_of_its_ratio(
    phase: str,
) -> None:
    names, gpus = ("width", "depth", "low_rank"), [load_hardware("h100"), load_hardware("rtx_4090")]
    found = winners(requests(phase), [Pruning.of(name, 0.5) for name in names], gpus)
    assert {(r.hardware, r.batch, r.seq) for r in found.best} == {
        (hw.label, *s) for hw in gpus for s in SHAPES
    }
    overlap = False
    for r, gains, certain in zip(found.best, found.gains, found.certain, strict=True):
        table = simulator.table(
            MODEL, r.hardware, names, 0.5, phase=phase, batch=r.batch, seq=r.seq
        )
        first, second, *_ = sorted(table, key=lambda one: -one.speedup)
        assert (r.family, gains) == (first.family, first.speedup > 1.0)
        assert r.speedup == pytest.approx(first.speedup, rel=1e-12)
        dense = simulator.lower(MODEL, phase=phase, batch=r.batch, seq=r.seq)
        pair = batch_with(
            dense, [simulator.prune(dense, one.family, 0.5) for one in (first, second)]
        )
        (log,), (below,), _ = against(pair, load_hardware(r.hardware), [np.array([0, 2, 2])])
        assert certain == (first.speedup_lower > 1.0 and log[1] - below[1] > 0.0)
        overlap |= bool(certain and first.speedup_lower < second.speedup_upper)
    assert overlap or phase == "prefill", (
        "a winner is certain although the intervals of two speedups overlap"
    )


def test_what_is_not_supported_does_not_compete() -> None:
    sparse24 = Pruning.of("semi_structured", 0.5)
    found = winners(
        [Request(model=MODEL)], [sparse24, Pruning.of("depth", 0.5)], [load_hardware("h100")]
    )
    assert ([r.family for r in found.best], found.gains.tolist(), found.certain.tolist()) == (
        ["depth"],
        [True],
        [True],
    )
    with pytest.raises(InputError, match="vllm has no 2:4 kernels"):
        winners([Request(model=MODEL)], [sparse24], [load_hardware("h100")])


def test_a_large_map_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prunings = [Pruning.of("width", 0.5), Pruning.of("token", 0.5)]
    whole = winners(requests("decode"), prunings, [load_hardware("h100")])
    monkeypatch.setattr("simulator.prediction.pareto.OPERATOR_ROWS", 1)
    parts = winners(requests("decode"), prunings, [load_hardware("h100")])
    assert [r.to_dict() for r in parts.best] == [r.to_dict() for r in whole.best]
    assert parts.certain.tolist() == whole.certain.tolist()
