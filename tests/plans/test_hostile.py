"""What an attack on costs and search found: refused in one line, or answered right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from simulator.plans.program import Program
from test_program import brute_force

from simulator.cli import run
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.plans.costs import Costs
from simulator.plans.library import groups_of, read_library
from simulator.plans.search import search

pytestmark = pytest.mark.quick

MODEL = load_model("llama-3.2-1b")


@pytest.mark.parametrize("text", ["\u00b2", "9" * 5000, "\u0663", True, 2.5, [4], ""])
def test_groups_are_numbers_or_ranges(text: object) -> None:
    with pytest.raises(InputError, match=r"^groups: ") as caught:
        groups_of(text, 16)
    assert len(str(caught.value)) < 200


def test_groups_are_numbers_with_blanks() -> None:
    assert groups_of(" 8 ", 16) == groups_of(8, 16)


@pytest.mark.parametrize("option", ["search --target 1.2 --scores", "costs --choices"])
def test_a_name_longer_than_file_systems_allow(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *words = option.split()
    assert run([command, "llama-3.2-1b", "--hardware", "h100", *words, "x" * 5000]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("runtime_ms", "expected a column of scores, got only times: runtime_ms"),
        ("kl_div", "kl_div: layer 0 has no value for attention none, mlp dense"),
        ("protocol", "the library has no scores"),
    ],
)
def test_messages_about_scores_name_the_file(tmp_path: Path, columns: str, says: str) -> None:
    path = tmp_path / "own.csv"
    value = "" if columns == "kl_div" else "1"
    path.write_text(f"layer,attention,mlp,{columns}\nall,dense,dense,0\nall,none,dense,{value}\n")
    with pytest.raises(InputError) as caught:
        search(MODEL, "h100", 1.2, path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_a_column_without_a_name_is_not_a_score(tmp_path: Path) -> None:
    """pandas writes its row numbers so."""
    path = tmp_path / "own.csv"
    path.write_text(",layer,attention,mlp,kl_div\n0,all,dense,dense,0\n1,all,none,dense,0.5\n")
    assert list(read_library(path, MODEL).values) == ["kl_div"]


def test_choices_by_layers_are_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("layers: [1]\n")
    with pytest.raises(InputError, match=r"own.yaml:1:9: layers: expected lists of variants by layers"):
        read_library(path, MODEL)


def test_choices_have_as_many_variants_as_other_libraries(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"attention: [dense, kv=4, none]\nmlp: [{', '.join(map(str, range(1, 1400)))}]\n")
    with pytest.raises(InputError, match="layer 0: expected at most 4096 variants, got"):
        read_library(path, MODEL)


@pytest.mark.parametrize("large", [1e6, 1e12, 1e20, 1e299])
def test_the_optimum_with_far_larger_scores(large: float) -> None:
    """A perplexity without the first layer may be a million times those of the other variants."""
    for seed in range(12):
        random = np.random.default_rng(seed)
        group = np.repeat(np.arange(5), random.integers(2, 5, 5))
        first = np.unique(group, return_index=True)[1]
        score, cost = random.random(len(group)), random.random((1, len(group)))
        score[random.random(len(group)) < 0.2] *= large
        score[first], cost[:, first] = 0.0, 1.0
        limit = cost.mean(axis=1) * 5 * random.uniform(0.5, 1.1)
        program = Program(group, score, cost)
        found, best = program.solve(limit), brute_force(program, limit)
        if best is None:
            assert found.excess > 0.0
        else:
            assert found.excess == found.gap == 0.0
            assert found.score == pytest.approx(best, rel=1e-6)


def test_scores_of_any_size_choose_the_same_layers(tmp_path: Path) -> None:
    path, plans = tmp_path / "own.csv", []
    for unit in (1.0, 1e-200, 1e290):
        path.write_text(
            f"layer,attention,mlp,kl_div\nall,dense,dense,0\nall,none,none,{4 * unit}\nall,dense,none,{unit}\n"
        )
        plans.append([row.mlp for row in search(MODEL, "h100", 1.2, path).layers])
    assert plans[0] == plans[1] == plans[2]
    assert "dense" in plans[0]


def test_rows_of_costs_are_made_a_few_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not once per row: costs in 32 settings took minutes to print."""
    made, rows = [], Costs.rows.fget
    monkeypatch.setattr(Costs, "rows", property(lambda self: made.append(1) or rows(self)))
    assert run(["costs", "llama-3.2-1b", "--hardware", "h100"]) == 0
    assert "attention takes" in capsys.readouterr().out
    assert len(made) < 10


def test_an_output_with_a_name_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["costs", "llama-3.2-1b", "--hardware", "h100", "-o", f"{'x' * 300}.csv"]) == 2
    assert "cannot be written" in capsys.readouterr().err
