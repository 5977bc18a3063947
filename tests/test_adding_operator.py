"""The operator of docs/adding.md: one file and one entry add it, and all that is written once takes it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from test_docs import PACKAGES, ROOT, blocks, edit, python

from calibration.fit.predict import SECTIONS
from simulator.errors import InputError
from simulator.operators import BY_CODE, CONSTANTS, OPERATORS
from simulator.workload import Workload

pytestmark = pytest.mark.quick

AFTERWARDS = """
from dataclasses import replace
from pathlib import Path

from calibration.fit.profile import provenance_of
from calibration.records.timing_table import Records, Source
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.uncertainty.factors import ERROR_FACTORS, Scales, uncertainty_of
from simulator.uncertainty.factors import Posterior

# the section is written and read
about = provenance_of(Records.from_columns([Source("planted")], m=8, n=8, k=8, seconds=1e-5), "2026-01-01")
mine = hw.calibrated({("selective_scan", "bf16"): replace(section, provenance=about)})
save_hardware(mine, Path("mine.yaml"))
again = operator_time(selective_scan(test.calls, load_hardware("mine.yaml")), load_hardware("mine.yaml"))
np.testing.assert_allclose(again.seconds, predicted.seconds, rtol=1e-5)

# other rows of another stack, whose launches take longer, move the error factor of launches, and predictions
few = test.take(slice(0, None, 16))
errors = uncertainty_of(selective_scan(few.calls, mine), Scales())
true = few.calls.seconds({**truth, "t0_s": 1.5 * truth["t0_s"]})
log_ratio = np.log(true / operator_time(selective_scan(few.calls, mine), mine).seconds)
kind = np.full(len(few), errors.kind)
p = Posterior.of(errors.wide(), errors.correlated, errors.independent, errors.coordinates, kind, log_ratio)
mean, sd = p.factor("selective_scan launch")
assert mean > 2.0 * sd > 0.0
shift, _ = p.at(errors)
assert np.abs(log_ratio - shift).mean() < 0.3 * np.abs(log_ratio).mean()
assert len(ERROR_FACTORS) == len(set(ERROR_FACTORS))

# its fixed time is the waterfall's launch: without constants of time, nothing is left of it
def launch(t0_s):
    constants = {**section.constants, "t0_s": replace(section.constants["t0_s"], value=t0_s)}
    changed = hw.calibrated({("selective_scan", "bf16"): replace(section, constants=constants)})
    return next(step.factor for step in simulator.waterfall(dense, fewer, changed) if step.name == "launch")

fewer = dense.replace(count=np.where(dense.kind == 8, dense.count, 0.5 * dense.count))
assert abs(np.log(launch(1e-4))) > 2.0 * abs(np.log(launch(1e-6)))
"""


def test_an_operator_in_one_file_is_predicted_fitted_saved_and_explained(tmp_path: Path) -> None:
    page = ROOT / "docs" / "adding.md"
    text = page.read_text(encoding="utf-8")
    first, last = (text[: text.index(heading)].count("\n") for heading in ("## An operator\n", "## A pruning family\n"))
    shown = [block for block in blocks(page) if first < block.line < last]
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, copy_function=os.symlink, ignore=ignored)
    for block in shown:
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "diff":
            edit(block.text, tmp_path)
    assert [block.file for block in shown if block.file.startswith("simulator")] == [
        "simulator/operators/selective_scan.py"
    ]
    fitted, in_a_pass = (b.text for b in shown if b.language == "python" and not b.file)
    python(["-c", fitted + in_a_pass + AFTERWARDS], tmp_path)


def test_operators_are_told_apart_and_none_is_forgotten() -> None:
    assert len(BY_CODE) == len(OPERATORS) == len({operator.name for operator in OPERATORS})
    assert len(CONSTANTS) == sum(len(operator.constants) for operator in OPERATORS) + 1  # and "runtime"
    assert all(len(operator.titles) in (0, len(operator.constants)) for operator in OPERATORS)
    # records of delta nets do not exist
    assert set(SECTIONS.values()) == CONSTANTS.keys() - {"delta_net"}


@pytest.mark.parametrize("code", [5, 8, 100, -1])
def test_a_row_of_no_operator_cannot_be_made(code: int) -> None:
    with pytest.raises(InputError, match="column kind"):
        Workload.from_rows([{"kind": code, "role": "q", "m": 1, "n": 1, "k": 1}])
