"""Additions of docs/adding.md: an operator is one file and one entry, a field of the request is one
declaration."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from examples import ROOT, blocks, edit, linked_packages, python

from calibration.fit.predict import SECTIONS
from simulator.errors import InputError
from simulator.operators import BY_CODE, CONSTANTS, MOST_CODES, OPERATORS
from simulator.workload import Workload

pytestmark = pytest.mark.quick

AFTERWARDS = """
from dataclasses import replace
from pathlib import Path

from calibration.fit.profile import provenance_of
from calibration.records.timing_table import Records, Source
from simulator.hardware.library import load_hardware
from simulator.hardware.save import save_hardware
from simulator.uncertainty.factors import ERROR_FACTORS

# the section is written and read
about = provenance_of(Records.from_columns([Source("planted")], m=8, n=8, k=8, seconds=1e-5), "2026-01-01")
mine = hw.calibrated({("selective_scan", "bf16"): replace(section, provenance=about)})
save_hardware(mine, Path("mine.yaml"))
again = operator_time(selective_scan(test.calls, load_hardware("mine.yaml")), load_hardware("mine.yaml"))
np.testing.assert_allclose(again.seconds, predicted.seconds, rtol=1e-5)

# its error factors have names of their own
assert len(ERROR_FACTORS) == len(set(ERROR_FACTORS))

# its fixed time is the waterfall's launch: without constants of time, nothing is left of it
def launch(t0_s):
    constants = {**section.constants, "t0_s": replace(section.constants["t0_s"], value=t0_s)}
    changed = hw.calibrated({("selective_scan", "bf16"): replace(section, constants=constants)})
    return next(step.factor for step in simulator.waterfall(dense, fewer, changed) if step.name == "launch")

fewer = dense.replace(count=np.where(dense.kind == CODE, dense.count, 0.5 * dense.count))
assert abs(np.log(launch(1e-4))) > 2.0 * abs(np.log(launch(1e-6)))
"""


EXAMPLE = ROOT / "docs" / "examples" / "selective_scan"
ENTRY = """\
+++ simulator/operators/__init__.py
@@
 from simulator.operators.gemm import Gemm
+from simulator.operators.selective_scan import SelectiveScan
@@
     DeltaNet(),
+    SelectiveScan(),
"""


def test_an_operator_in_one_file_is_predicted_fitted_saved_and_explained(tmp_path: Path) -> None:
    linked_packages(tmp_path)
    for file, package in (("operator", "simulator/operators"), ("fit", "calibration/fit")):
        shutil.copy(EXAMPLE / f"{file}.py", tmp_path / package / "selective_scan.py")
    edit(ENTRY, tmp_path)
    python(["-c", (EXAMPLE / "check.py").read_text(encoding="utf-8") + AFTERWARDS], tmp_path)


FIELD = """
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import simulator
from simulator.cli import run
from simulator.prediction.sweep import read_grid

asked = {"batch": 32, "seq": 32768}
short, whole = (simulator.predict("llama-3.1-8b", "depth 0.25", "h100", **asked, window=w) for w in (4096, None))
assert short.dense_s < 0.5 * whole.dense_s
assert [r.dense_s for r in simulator.table("llama-3.1-8b", "h100", "depth", 0.25, **asked, window=[4096, None])] == [
    short.dense_s, whole.dense_s
]
axes = "models: llama-3.1-8b\\nhardware: h100\\nsparsities: 0.25\\nfamilies: depth\\nphases: decode\\n"
for window in ("4096", "x"):
    Path(f"{window}.yaml").write_text(f"{axes}batches: 32\\nseqs: 32768\\nwindow: {window}\\n")
assert simulator.sweep(read_grid("4096.yaml")).dense_s.tolist() == [short.dense_s]
with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as errors:
    statuses = [run(words.split()) for words in (
        "speedup --help", "sweep x.yaml -o rows", "speedup llama-3.1-8b --hardware h100 --window 0"
    )]
assert statuses == [0, 2, 2]
assert "--window N" in printed.getvalue()
assert "x.yaml:8:9: window: expected a whole number" in errors.getvalue()
assert "--window: expected a whole number from 1" in errors.getvalue()
try:
    from simulator.explore.app import of_setting
except ModuleNotFoundError:  # the extra explore is not installed
    raise SystemExit
field = of_setting("window")
assert (field.label, field.default, field.read("4k"), field.read("")) == ("Window", "", 4096, None)
assert field.help.startswith("Most tokens that a layer attends to")
"""


def test_a_field_of_the_request_is_declared_in_one_place(tmp_path: Path) -> None:
    linked_packages(tmp_path)
    for block in blocks(ROOT / "docs" / "adding.md"):
        if block.language == "diff":
            edit(block.text, tmp_path)
    python(["-c", FIELD], tmp_path)


def test_operators_are_told_apart_and_none_is_forgotten() -> None:
    assert len(BY_CODE) == len(OPERATORS) == len({operator.name for operator in OPERATORS})
    # and "runtime" and "power"
    assert len(CONSTANTS) == sum(len(operator.constants) for operator in OPERATORS) + 2
    assert all(len(operator.titles) in (0, len(operator.constants)) for operator in OPERATORS)
    # powers are no times of operators
    assert {*SECTIONS.values(), "power"} == CONSTANTS.keys()


@pytest.mark.parametrize("code", [5, MOST_CODES, 127, -1])
def test_a_row_of_no_operator_cannot_be_made(code: int) -> None:
    with pytest.raises(InputError, match="column kind"):
        Workload.from_rows([{"kind": code, "role": "q", "m": 1, "n": 1, "k": 1}])
