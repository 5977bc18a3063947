"""Generated pages: tables of rows, constants and their errors, ablations that leave out what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.cli import pages
from calibration.fit.gemm import products
from calibration.validation import ablations, acceptance
from calibration.validation.protocol import MeasuredRows, errors
from simulator.cost.base import Machine
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.uncertainty.operators import gemm_time


@pytest.mark.parametrize("page", ["ablations", "engines"])
def test_a_page_is_filled_with_its_tables_and_keeps_its_prose(page: str) -> None:
    text = (pages.DOCS / f"{page}.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    first = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    own = ["\n".join(lines[i - 1 : lines.index("", i) if "" in lines[i:] else None]) for i in first]
    assert pages.filled(page, own) == text
    assert "other" in pages.filled(page, [*own[:-1], "| other |"]).splitlines()[-1]
    expected = rf"docs/generated/{page}.md: expected {len(own) - 1} tables to fill, got {len(own)}"
    with pytest.raises(InputError, match=expected):
        pages.filled(page, own[1:])


def test_the_accuracy_page_marks_a_missed_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_published", lambda: ())
    rows = [
        {"table": name, "method": "prunesim", "rows": 0, "trained_on": 9, "seed": seed, "mape": mape, "coverage": 90.0}
        for name, mape in (("h100", 4.5), ("a100", 3.0))
        for seed in (0, 1, 2)
    ]
    page = pages.accuracy_page(rows)
    assert page.startswith("# Accuracy of every shipped table\n")
    assert "| GEMM, h100, unseen (n, k): MAPE | <= 4 | **4.50** |" in page
    assert "| GEMM, a100, unseen (n, k): MAPE | <= 5 | 3.00 |" in page
    assert "## h100\n\n| method | rows | MAPE | coverage |" in page


@pytest.fixture(scope="module")
def planted() -> MeasuredRows:
    """2,016 shapes of 42 (n, k) pairs, timed by the shipped H100 model with 2 % noise."""
    hw, rng = load_hardware("h100"), np.random.default_rng(5)
    pairs = np.round(2 ** rng.uniform(7, 14, (42, 2)) / 16) * 16
    m = np.tile(np.unique(np.round(2.0 ** np.linspace(0, 13, 48))), 42)
    n, k = np.repeat(pairs, len(m) // 42, axis=0).T
    data = products(m, n, k, np.ones(m.size), Machine.of(hw, "bf16"))
    noise = np.exp(0.02 * rng.standard_normal(m.size))
    seconds = gemm_time(m, n, k, hw, copies=data.calls.copies).seconds
    return MeasuredRows(replace(data, seconds=seconds * noise), hw)


@pytest.mark.slow
def test_an_ablation_of_nothing_is_the_fit_that_ships(planted: MeasuredRows) -> None:
    shipped = planted.fit(seed=3)
    own = ablations.fit_variant(ablations.FULL, planted, 3)
    assert own == {name: constant.value for name, constant in shipped.constants.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no launch time", "no split-K", "no L2 residency"])
def test_an_ablation_leaves_out_what_it_says(name: str, planted: MeasuredRows) -> None:
    variant = next(v for v in ablations.VARIANTS if v.name == name)
    found = ablations.fit_variant(variant, planted)
    assert {constant: found[constant] for constant in variant.fixed} == variant.fixed
    full = ablations.fit_variant(ablations.FULL, planted)
    without, complete = (errors(planted.data.calls.seconds(c), planted.data)["mape"] for c in (found, full))
    assert without > complete


def test_the_tables_of_ablations_are_made_of_their_rows(planted: MeasuredRows) -> None:
    units = [u for u in ablations.units(("h100",), (0, 1)) if u[1].name in ("nothing", "no launch time")]
    assert len(units) == 4
    rows = [
        {"table": table, "variant": variant.name, "seed": seed, "rows": 9, "mape": 4.0 + at}
        for at, (table, variant, seed) in enumerate(units)
    ]
    (page,) = ablations.tables(rows)
    assert "| nothing | the complete analytical model | 4.50 |  |" in page
    assert "| no launch time | `t0` = 0 | 6.50 | +2.00 ± 0.00 |" in page
    row = ablations.run(units[0], planted, size=1600)
    assert list(row) == list(rows[0])
    assert 0.5 < row["mape"] < 15.0  # without the residual


def test_the_program_refuses_what_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pages.main(["commands", "-o", str(tmp_path / "c.md")]) == 0
    assert (tmp_path / "c.md").read_text(encoding="utf-8").startswith("# Commands\n")
    assert pages.main(["commands", "-o", str(tmp_path / "none" / "c.md")]) == 2
    assert "none" in capsys.readouterr().err
