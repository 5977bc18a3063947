"""``--energy`` of commands: tables, JSON, CSV, figures, sweeps, and refused prices."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tables import rows_of

import simulator
from simulator import Energy, Tariff

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("inside")]
ASKED = "llama-3.1-8b --hardware h100 --prune 'depth 0.25'"
EXCLUDED = "note: energy is that of the devices: it excludes the host (--host-watts) and cooling"


def test_speedup_says_what_energy_is_saved_and_why(cli: Any) -> None:
    out, err = cli(f"speedup {ASKED} --energy")
    assert "depth at 25 % saves " in out
    assert "of the energy on h100_sxm in vllm (decode, batch 1, seq 2048)" in " ".join(out.split())
    assert "energy per new token" in out
    assert err.count(EXCLUDED) == 1
    plain, err = cli(f"speedup {ASKED}")
    assert "energy" not in plain + err


def test_prices_imply_energy_and_add_columns(cli: Any) -> None:
    out, err = cli(
        f"speedup {ASKED} --phase prefill --electricity 0.15 --carbon 400 --pue 1.3"
        " --host-watts 100"
    )
    for title in ("prompt token", "cost/M tokens", "g CO2/M tokens", "J per request"):
        assert title in out
    assert "it excludes" not in err
    (row,) = json.loads(cli.out(f"speedup {ASKED} --json --electricity 0.15 --pue 1.3"))
    r = simulator.predict("llama-3.1-8b", "depth 0.25", "h100")
    expected = Energy.of(r, Tariff(electricity=0.15, pue=1.3)).to_dict()
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["dense_carbon_g_per_million_tokens"] is None
    rows = list(csv.DictReader(io.StringIO(cli.out(f"speedup {ASKED} --energy --csv -"))))
    assert float(rows[0]["pruned_joules_per_token"]) == r.energy.pruned_joules_per_token


@pytest.mark.parametrize(
    ("option", "error"),
    rows_of("""
--pue 0.5         | pue: expected a factor from 1 to 1e6, such as 1.3, got 0.5
--electricity nan | electricity: expected the price of a kWh
--carbon much     | --carbon
--host-watts -1   | host_watts: expected W of the host per device
"""),
)
@pytest.mark.parametrize("command", ["speedup", "explain", "serve"])
def test_wrong_prices_are_refused_by_name(cli: Any, command: str, option: str, error: str) -> None:
    assert error in cli.refused(f"{command} {ASKED} {option}")


def test_explain_shows_what_draws_the_power(cli: Any) -> None:
    out = cli.out(f"explain {ASKED} --engine vllm,hf --energy")
    for line in ("vllm: energy of a pass", "hf: energy of a pass", "idle ", "compute ", "sum "):
        assert line in out
    (row,) = json.loads(cli.out(f"explain {ASKED} --energy --json"))
    assert sum(dense for dense, _ in row["energy_parts"].values()) == pytest.approx(
        row["dense_joules"]
    )


def test_serve_shows_energy_in_a_table_of_its_own(cli: Any) -> None:
    out = cli.out(f"serve {ASKED} --concurrency 64 --electricity 0.15")
    assert max(map(len, out.splitlines())) <= 120
    assert "energy per output token" in out
    assert "electricity" in out
    out = cli.out(f"serve {ASKED} --rate 2 --requests 40 --seq 256 --new-tokens 16 --energy")
    assert "of the energy" in " ".join(out.split())
    assert "energy per output token" in out
    dense, _ = json.loads(cli.out(f"serve {ASKED} --requests 20 --new-tokens 8 --energy --json"))
    assert dense["watts_lower"] < dense["watts"] < dense["watts_upper"] <= 700.0
    assert dense["electricity"] is None


def test_a_power_limit_is_named_in_the_answer_and_in_a_note(cli: Any) -> None:
    for line in (
        f"speedup {ASKED}",
        f"explain {ASKED}",
        f"serve {ASKED}",
        f"serve {ASKED} --requests 20 --new-tokens 8",
        "advise llama-3.1-8b --hardware h100 --target 1.2",
        "draft llama-3.1-8b --hardware h100 --prune 'depth 0.5'",
    ):
        out, err = cli(f"{line} --power-limit 450")
        assert "h100_sxm under 450 W (assumed)" in " ".join(out.split()), line
        assert err.count("note: under 450 W: how clocks fall is assumed") == 1, line
    assert "power_limit: expected" in cli.refused(f"speedup {ASKED} --power-limit 900")
    refused = cli.refused("methods check shortgpt --power-limit 450")
    assert "--power-limit" in refused


def test_figures_of_energy_over_batch_and_sparsity(cli: Any, tmp_path: Path) -> None:
    for more in ("--batch 1,64 --prune 'depth 0.25'", "--family depth,width --sparsity 0.2,0.5"):
        file = tmp_path / "energy.svg"
        cli(f"speedup llama-3.1-8b --hardware h100 {more} --energy --figure {file}")
        assert "energy saved" in file.read_text("utf-8")


GRID = """
models: [llama-3.2-1b]
hardware: [h100_sxm]
phases: [decode, prefill]
batches: [1, 8]
seqs: [512]
prune: [depth 0.25]
electricity: 0.15
"""


def test_a_grid_states_prices(cli: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    file, folder = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(GRID, "utf-8")
    cli(f"sweep {file} -o {folder} --jobs 1")
    frame = pandas.read_parquet(folder)
    assert list(frame.columns) == list(simulator.sweep(str(file)).columns)
    kwh = frame["pruned_joules_per_token"] / 3.6
    assert frame["pruned_cost_per_million_tokens"].to_numpy() == pytest.approx(0.15 * kwh)
    assert frame["dense_joules_per_request"].isna().tolist() == [True, True, False, False]
    file.write_text(GRID.replace("electricity: 0.15", "energy: true"), "utf-8")
    cli(f"sweep {file} -o {folder} --jobs 1")  # replaces the rows without a price
    assert pandas.read_parquet(folder)["pruned_cost_per_million_tokens"].isna().all()
    file.write_text(GRID.replace("0.15", "-1"), "utf-8")
    assert ":8:14: electricity: expected a number from 0 to 1e+06, got -1" in cli.refused(
        f"sweep {file} -o {folder}"
    )


def test_the_report_shows_energy_on_request(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    cli(f"report {ASKED} --energy -o {file}")
    page = file.read_text("utf-8")
    assert "of the energy on h100_sxm" in page
    assert "energy saved</th>" in page
    assert "prunesim speedup llama-3.1-8b --hardware h100 --prune" in page
    cli(f"report {ASKED} --phase serve --rate 2 --new-tokens 8 --electricity 0.15 -o {file}")
    assert "electricity" in file.read_text("utf-8")
