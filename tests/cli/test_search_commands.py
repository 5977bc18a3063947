"""``prunesim costs`` and ``prunesim search`` as they are typed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from tables import rows_of

MODEL = "llama-3.2-1b"


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Three variants of each layer, of which deep ones cost least quality."""
    lines = ["layer,attention,mlp,kl_div"]
    for layer in range(16):
        lines += [
            f"{layer},dense,4096,{0.1 + 0.01 * (16 - layer)}",
            f"{layer},none,dense,{0.5 + 0.02 * (16 - layer)}",
        ]
    file = tmp_path / "scores.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


# -- costs -----------------------------------------------------------------------------------------


def test_costs_begin_with_the_parts_of_a_pass(cli: Any) -> None:
    out = cli.out(f"costs {MODEL} --hardware h100 --batch 8")
    assert "attention takes" in out.splitlines()[0]
    assert "0-15" in out  # equal layers share a row
    rows = cli.json(f"costs {MODEL} --hardware h100 --batch 8")
    assert sum(row["seconds"] for row in rows if row["variant"] == "dense") > 0
    assert {row["layer"] for row in rows} == {-1, *range(16)}


def test_costs_are_written_whole(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "costs.csv"
    line = f"costs {MODEL} --hardware h100,a100 --phase decode"
    rows = cli.json(line)
    cli.out(f"{line} --csv {file}")
    with open(file, newline="") as opened:
        written = list(csv.DictReader(opened))
    assert len(written) == len(rows)
    assert float(written[7]["seconds"]) == rows[7]["seconds"]


BAD = """
costs @ --csv LONG.csv                  | cannot be written
costs @ --choices LONG                  | cannot be read
costs @ --choices missing.csv           | missing.csv: cannot be read
search @ --target 0.5                   | above 1
search @                                | --target: expected a target, such as --target 1.3x, or --latency
search @ --memory 40 --target 1.2       | --memory '40'
search @ --params many --target 1.2     | --params 'many'
search @ --target 1.2                   | --scores: expected the scores of each
"""


@pytest.mark.parametrize(("line", "message"), rows_of(BAD))
def test_bad_input_is_one_line(cli: Any, line: str, message: str) -> None:
    line = line.replace("@", f"{MODEL} --hardware h100").replace("LONG", "x" * 5000)
    assert message in cli.refused(line)


# -- search ----------------------------------------------------------------------------------------


def test_a_search_begins_with_its_plan(cli: Any, scores: Path) -> None:
    out = cli.out(f"search {MODEL} --hardware h100 --scores {scores} --target 1.3 --batch 8")
    first = out.splitlines()[0]
    assert first.startswith("The plan changes ")
    assert "faster than llama-3.2-1b on h100_sxm" in first
    for title in (
        "plan: the best by the sum of its layers' costs",
        "frontier of score against time",
    ):
        assert title in out
    (plan,) = cli.json(f"search {MODEL} --hardware h100 --scores {scores} --target 1.3 --batch 8")
    assert len(plan["layers"]) == 16
    assert plan["results"][0]["speedup"] >= 1.3
    assert plan["targets"][0]["probability"] >= 0.5


def test_a_written_plan_is_a_pruning_with_the_same_speedup(
    cli: Any, scores: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    (plan,) = cli.json(
        f"search {MODEL} --hardware h100 --scores {scores} --target 1.3 --batch 8 --write {folder}"
    )
    asked = "--hardware h100 --phase decode --batch 8"
    (pruned,) = cli.json(f"speedup {MODEL} {asked} --prune {folder / 'plan.yaml'}")
    assert pruned["speedup"] == pytest.approx(plan["results"][0]["speedup"], rel=1e-6)
    (stored,) = cli.json(f"speedup {MODEL} {asked} --pruned {folder / 'config.json'}")
    assert stored["pruned_s"] == pytest.approx(plan["results"][0]["pruned_s"], rel=1e-9)


def test_settings_and_targets_are_listed(cli: Any, scores: Path) -> None:
    targets = "--target 1.1 --memory 60GiB --params 1.2B --confidence 0.8"
    out = cli.out(f"search {MODEL} --hardware h100,a100 --scores {scores} {targets} --batch 8")
    assert out.count("1.10x") == 2
    assert "1.20 B" in out


def test_a_plan_that_prunings_cannot_state_is_no_file(cli: Any, tmp_path: Path) -> None:
    file, folder = tmp_path / "linear.csv", tmp_path / "plan"
    file.write_text("layer,mlp,kl_div\nall,dense,0\nall,linear,0.1\n")
    folder.mkdir()
    (folder / "plan.yaml").write_text("prune: depth 0.5\n")  # the plan of another search
    _, err = cli(
        f"search {MODEL} --hardware h100 --scores {file} --target 1.2 --batch 8 --write {folder}"
    )
    assert "plan.yaml is not written: plan: --prune has no linear sublayers" in err
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]
    line = f"search {MODEL} --hardware h100 --scores {file} --target 1.2 --batch 8 --write {file}"
    assert "is a file; expected a folder" in cli.refused(line)


def test_the_files_of_a_folder_are_of_one_plan(cli: Any, scores: Path, tmp_path: Path) -> None:
    line = (
        f"search {MODEL} --hardware h100 --scores {scores} --batch 8 --write {tmp_path / 'plan'}"
        " --target"
    )
    cli(f"{line} 1.2")
    before = {path.name: path.read_bytes() for path in (tmp_path / "plan").iterdir()}
    assert "exists with different content; choose another folder" in cli.refused(f"{line} 1.4")
    assert {path.name: path.read_bytes() for path in (tmp_path / "plan").iterdir()} == before
    cli(f"{line} 1.2")


def test_a_plan_is_checked_before_it_is_a_file(
    cli: Any, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that is killed while it checks leaves no plan of other shapes."""
    folder = tmp_path / "plan"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulator.plans.write.check_plan", killed)
    assert (
        cli.run(
            f"search {MODEL} --hardware h100 --scores {scores} --target 1.2 --write {folder}".split()
        )
        == 130
    )
    assert list(folder.iterdir()) == []
