"""The operator of docs/adding.md: one file adds it, and all that is written once over cost models takes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_docs import ROOT, blocks, python

AFTERWARDS = """
from pathlib import Path

from simulator.operators import add_constants
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.uncertainty.factors import ERROR_FACTORS, Scales, add_errors, uncertainty_of
from simulator.operators.base import ErrorSize
from simulator.uncertainty.posterior import Posterior

# the section is written and read
from calibration.records.timing_table import Records, Source
from calibration.fit.profile import provenance_of
from dataclasses import replace

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

for add in (lambda: add_constants("selective_scan", {}), lambda: add_errors("selective_scan", {}, ErrorSize(0.1, 0.1))):
    try:
        add()
    except ValueError as error:
        assert "'selective_scan' are known already" in str(error)
    else:
        raise AssertionError("added twice")
assert len(ERROR_FACTORS) == len(set(ERROR_FACTORS))
"""


@pytest.mark.quick
def test_an_operator_in_one_file_is_predicted_fitted_saved_and_updated(tmp_path: Path) -> None:
    page = ROOT / "docs" / "adding.md"
    text = page.read_text(encoding="utf-8")
    first, last = (text[: text.index(heading)].count("\n") for heading in ("## An operator\n", "## A pruning family\n"))
    shown = [block for block in blocks(page) if first < block.line < last and block.language == "python"]
    files, (example,) = [b for b in shown if b.file], [b for b in shown if not b.file]
    (file,) = files
    assert re.fullmatch(r"\w+\.py", file.file)
    (tmp_path / file.file).write_text(file.text, encoding="utf-8")
    python(["-c", example.text + AFTERWARDS], tmp_path)
