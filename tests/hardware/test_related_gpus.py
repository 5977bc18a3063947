"""Kernels that were fitted on a related GPU: wider intervals, and one note that names the GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from operator_times import decode_time, errors_of, of_experts, prefill_time

import simulator
from simulator.hardware.library import inheriting, load_hardware
from simulator.uncertainty.forward import ratio_half

pytestmark = pytest.mark.quick


def test_kernels_of_another_gpu_are_less_certain() -> None:
    """A copy of the H100 that inherits its fits has the same times and wider intervals, also where
    the fits count as its own."""
    measured = load_hardware("h100")
    bare = replace(measured, name="copy", sections={}, stacks={}, stack="")
    copy = inheriting(bare, measured)
    assert copy.sibling
    for timed in (prefill_time, decode_time):
        sizes = (4, 512, 512, 32, 8, 128) if timed is prefill_time else (4, 512, 32, 8, 128)
        own, other = (timed(*sizes, hw) for hw in (measured, copy))
        assert other.seconds == pytest.approx(own.seconds)
        assert other.upper > own.upper
    sizes = (64, 768, 2048, 128, 8)
    fp8 = {"dtype": "fp8", "weight_dtype": "fp8_block"}
    own, other = (errors_of(of_experts, *sizes, hw, **fp8) for hw in (measured, copy))
    added = dict(zip(other.factors, other.systematic[:, 0]))["experts gpus"]
    assert added == pytest.approx(0.4)
    assert np.sqrt(other.variance) > np.sqrt(own.variance)
    # two GPUs differ by one factor per operator, which cancels in a ratio
    narrow = (64, 576, 2048, 128, 8)
    halves = [
        ratio_half(
            errors_of(of_experts, *sizes, hw, **fp8), errors_of(of_experts, *narrow, hw, **fp8)
        )
        for hw in (measured, copy)
    ]
    assert halves[1] == pytest.approx(halves[0], rel=0.05)


@pytest.mark.parametrize(
    ("name", "origin"), [("h800", "h100_sxm"), ("a100_pcie_80gb", "a100_sxm_80gb"), ("h100", "")]
)
def test_one_note_names_the_gpu(name: str, origin: str) -> None:
    found = simulator.table(["llama-3.1-8b"], [name], prune=["depth 0.25"], phase="decode")
    notes = [note for note in found.notes if "never measured on" in note]
    assert len(notes) == bool(origin)
    assert all(f"fitted on {origin}, never measured on {name}:" in note for note in notes)
