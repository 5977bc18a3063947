"""Drawn lengths and arrival times, and traces from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tables import tables_of

from simulator.errors import InputError
from simulator.serving import arrivals
from simulator.serving.arrivals import Lengths, Traffic, read_trace

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("mean", "log_sd", "most"), [(215, 1.0, 1024), (200, 0.3, 2048), (500, 1.5, 1024)]
)
def test_truncated_lengths_have_their_mean(mean: float, log_sd: float, most: int) -> None:
    drawn = Lengths(mean, log_sd, 4, most).at(np.random.default_rng(1).random(200_000))
    assert drawn.min() >= 4
    assert drawn.max() <= most
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    # the deviation is that of the logs where truncation is rare
    if log_sd == 0.3:
        assert np.log(drawn).std() == pytest.approx(log_sd, rel=0.02)


def test_a_mean_that_truncation_excludes_is_refused() -> None:
    with pytest.raises(
        InputError, match="mean length: expected 6 to 744 with this deviation, got 1000"
    ):
        Lengths(1000, 2.0, 4, 1024).at(np.array([0.5]))


def test_requests_arrive_at_their_rate_with_the_same_draws() -> None:
    slow, fast = (
        Traffic(Lengths(100, 0.5), Lengths(50), 5_000, rate=rate).draw() for rate in (2.0, 8.0)
    )
    assert slow.arrival[-1] == pytest.approx(5_000 / 2.0, rel=0.05)
    assert np.allclose(slow.arrival, 4.0 * fast.arrival)
    assert (slow.prompt == fast.prompt).all()


def test_whole_numbers_may_be_floats() -> None:
    whole = Traffic(Lengths(9, 0.5), Lengths(9), 20, concurrency=2, seed=3).draw()
    floats = Traffic(Lengths(9, 0.5), Lengths(9), 20.0, concurrency=2.0, seed=3.0).draw()
    assert floats.prompt.tolist() == whole.prompt.tolist()
    assert repr(floats.concurrency) == "2"


def test_long_requests_are_drawn_again() -> None:
    drawn = Traffic(Lengths(215, 1.0, 4, 1024), Lengths(200, 1.0, 4), 5_000, most_total=1200).draw()
    assert (drawn.prompt + drawn.output).max() <= 1200


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_trace_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "trace.csv", "output,arrival,prompt\n7,10.5,100\n\n9,12,3\n")
    read = read_trace(file)
    assert read.arrival.tolist() == [0.0, 1.5]
    assert read.prompt.tolist() == [100, 3]
    assert read.output.tolist() == [7, 9]


@pytest.mark.parametrize(("rows", "reason"), tables_of("serving/mistakes.yaml")["traces"])
def test_bad_rows_are_refused_with_their_place(tmp_path: Path, rows: str, reason: str) -> None:
    file = write(tmp_path / "trace.csv", f"arrival,prompt,output\n1,10,3\n{rows}\n2,10,3\n")
    with pytest.raises(InputError) as error:
        read_trace(file, most_tokens=4096)
    assert str(error.value).startswith(f"{file}:{reason}")


def test_other_columns_and_empty_files_are_refused(tmp_path: Path) -> None:
    for text, reason in (
        ("arrival,prompt\n0,1\n", ":1: column output is missing; expected arrival, prompt, output"),
        ("arrival,prompt,output,user\n0,1,1,1\n", "column 'user' is unknown"),
        ("", "is empty; expected a header with the columns arrival, prompt, output"),
        ("arrival,prompt,output\n", "has a header but no rows"),
    ):
        with pytest.raises(InputError, match=reason):
            read_trace(write(tmp_path / "trace.csv", text))
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "missing.csv")


def test_a_trace_of_too_many_rows_states_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "MOST_REQUESTS", 2000)
    file = write(tmp_path / "trace.csv", "arrival,prompt,output\n" + "1,10,3\n" * 2001)
    with pytest.raises(InputError, match=r"trace.csv:2002: expected at most 2,000 requests; split"):
        read_trace(file)
