"""Files that version 0.1 wrote are read for ever: a calibrated profile with its arrays, and the records of a run.

``golden/0.1`` holds a profile that 0.1 shipped and the first records of a run that it measured; the times below are
what 0.1 printed of that profile.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import simulator
from calibration.records.store import read_store

GOLDEN = Path(__file__).parent / "golden" / "0.1"
TIMES_US = {  # (n, k): of 1 to 4,096 rows
    (4096, 1536): [1513.375, 2283.6411, 2253.4695, 5028.3237, 16056.5879, 57213.0547, 228848.4844],
    (14336, 4096): [15435.75, 20718.7148, 23109.3535, 48647.2109, 148154.5625, 532076.375, 2113697.25],
}


@pytest.mark.parametrize(("n", "k"), TIMES_US)
def test_a_profile_gives_the_times_it_gave(n: int, k: int) -> None:
    hw = simulator.load_hardware(str(GOLDEN / "cpu.yaml"))
    times = simulator.gemm_time(4 ** np.arange(7), n, k, hw, dtype="fp32")
    np.testing.assert_allclose(times.seconds * 1e6, TIMES_US[n, k], rtol=1e-6)
    assert (times.lower <= times.seconds).all()
    assert (times.seconds < times.upper).all()


def test_a_profile_predicts_a_whole_model_with_the_intervals_of_today() -> None:
    hw = simulator.load_hardware(str(GOLDEN / "cpu.yaml"))
    dense = simulator.lower(simulator.load_model("llama-3.2-1b"), phase="decode", batch=1, seq=256, dtype="fp32")
    s = simulator.speedup(dense, simulator.prune(dense, "width", sparsity=0.25), hw)
    assert s.lower < s.speedup < s.upper
    assert s.speedup == pytest.approx(1.26, abs=0.02)  # 0.1 said 1.261


def test_a_constant_beyond_the_bounds_of_today_stays_as_it_was_fitted(tmp_path: Path) -> None:
    text = (GOLDEN / "cpu.yaml").read_text()
    start = text.index("c_l2: {value: ") + len("c_l2: {value: ")
    (tmp_path / "cpu.yaml").write_text(f"{text[:start]}1.5{text[text.index(',', start) :]}")
    shutil.copy(GOLDEN / "cpu.07ba866c90fd.npz", tmp_path)
    assert simulator.load_hardware(str(tmp_path / "cpu.yaml")).section("gemm", "fp32")["c_l2"] == 1.5


def test_the_records_of_a_run_are_read_to_the_last() -> None:
    records = read_store(GOLDEN / "records.jsonl")
    assert len(records.rows) == 7
    assert records.rows[0]["median_s"] == 0.0008325370000000001
