"""Whole runs of the program in places that are hard on programs: full disks, closed streams, odd locales, no home, and another run beside.

Each run is a process of its own. What it may do is what the README says: exit 0, or 1 for a failure, or 2 for bad input, with one line.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calibration.execute.quality_results import Results
from calibration.records.importers import import_table
from simulator.errors import InputError
from simulator.hardware.library import load_hardware

ROOT = Path(__file__).resolve().parents[2]
GRID = "models: [llama-3.2-1b]\nhardware: [h100]\nfamilies: [depth]\nsparsities: [0.25]\nphases: [decode]\nbatches: [1]\nseqs: [2048]\n"
TABLE = "m,n,k,latency_us\n" + "".join(
    f"{m},{n},4096,{30 + m * n / 4e4:.3f}\n" for m in (1, 4, 16, 64, 256, 1024) for n in (1024, 2048, 4096, 8192)
)
MODEL = ("llama-3.2-1b", "--hardware", "h100")

WRITERS: Mapping[str, tuple[str, ...]] = {
    "csv": ("speedup", *MODEL, "--family", "depth", "--sparsity", "0.25", "--csv", "out/s.csv"),
    "figure": ("speedup", *MODEL, "--family", "depth", "--sparsity", "0.25", "--figure", "out/s.pdf"),
    "figures": ("figures", "--only", "speedup", "--hardware", "h100", "--format", "png", "-o", "out"),
    "sweep": ("sweep", "grid.yaml", "-o", "out/s.parquet"),
    "import": ("import", "t.csv", "-o", "out/t.parquet"),
    "fit": ("fit", "t.csv", "--hardware", "h100", "-o", "out/p.yaml"),
    "validate": ("validate", "h100", "h100_sxm/gemm/trtllm", "--html", "out/v.html"),
}
"""A command for every kind of file that is written."""

PRINTERS: Mapping[str, tuple[str, ...]] = {
    "table": ("speedup", *MODEL, "--family", "depth", "--sparsity", "0.25"),
    "help": ("--help",),
    "show": ("hardware", "show", "h100"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with inputs, and ``out`` to write to."""
    pytest.importorskip("pyarrow")
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "t.csv").write_text(TABLE)
    (tmp_path / "out").mkdir()
    return tmp_path


def run(words: tuple[str, ...], place: Path, prepare: Callable[[], None] | None = None) -> tuple[int, bytes, list[str]]:
    """Status, standard output, and the lines of standard error that are no notes."""
    done = subprocess.run(
        [sys.executable, "-m", "calibration.cli", *words],
        cwd=place,
        capture_output=True,
        timeout=120,
        preexec_fn=prepare,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
    )
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    return done.returncode, done.stdout, [line for line in lines if not line.startswith("note: ")]


# -- disks ------------------------------------------------------------------------------------------------------------------------


def _small_files() -> None:
    """No file may grow beyond a kilobyte: what is written beyond fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


@pytest.mark.parametrize(
    "what", ["figure", "sweep", *(pytest.param(w, marks=pytest.mark.slow) for w in ("figures", "fit", "validate"))]
)
def test_a_full_disk_leaves_what_was_there(what: str, place: Path) -> None:
    words = WRITERS[what]
    target = place / (words[-1] if what != "figures" else "out/speedup.png")
    target.write_bytes(b"old")
    if what == "sweep":
        target.unlink()  # it does not write over a file in any case
    status, _, lines = run(words, place, _small_files)
    assert (status, len(lines)) == (1, 1), lines
    assert "File too large" in lines[0]
    assert "out/" in lines[0]
    left = {p.name for p in (place / "out").iterdir()}
    assert left <= {target.name}, left
    assert what == "sweep" or target.read_bytes() == b"old"


@pytest.mark.parametrize("what", PRINTERS)
def test_output_to_a_full_disk_fails_in_one_line(what: str, place: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    words = " ".join(PRINTERS[what])
    status, _, lines = _shell(f"{sys.executable} -m calibration.cli {words} > /dev/full", place)
    assert (status, lines) == (1, ["prunesim: No space left on device"])


@pytest.mark.parametrize("what", PRINTERS)
@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "| head -c 1 > /dev/null"])
def test_closed_streams_are_quiet(what: str, redirection: str, place: Path) -> None:
    status, _, lines = _shell(
        f"set -o pipefail; {sys.executable} -m calibration.cli {' '.join(PRINTERS[what])} {redirection}", place
    )
    assert status in ((0, 1) if "head" in redirection else (0,))
    assert not lines


def _shell(line: str, place: Path) -> tuple[int, bytes, list[str]]:
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, timeout=60, env=environment)
    return done.returncode, done.stdout, [x for x in done.stderr.decode().splitlines() if not x.startswith("note: ")]


@pytest.mark.parametrize("what", WRITERS)
@pytest.mark.parametrize(
    "target", ["/proc/nothing/x.{}", "/dev/null/x.{}", "missing/x.{}", "x\0.{}", "x" * 300 + ".{}"]
)
def test_places_that_cannot_be_written_to(
    what: str, target: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from calibration.cli import run as in_process

    words = WRITERS[what]
    path = target.format(Path(words[-1]).suffix[1:] or "png")
    monkeypatch.chdir(place)
    before = sorted(str(p) for p in place.rglob("*"))
    status = in_process([*words[:-1], path])
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note: ")]
    if what == "figures" and path.startswith("missing/"):
        assert status == 0  # folders of a set of figures are made
        return
    assert status in (1, 2), lines
    assert len(lines) == 1, lines
    assert lines[0].isprintable()
    assert sorted(str(p) for p in place.rglob("*")) == before


# -- surroundings -----------------------------------------------------------------------------------------------------------------

SURROUNDINGS: Mapping[str, Mapping[str, str | None]] = {
    "the C locale without UTF-8": {
        "LC_ALL": "C",
        "LANG": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": None,
    },
    "a locale of decimal commas": {"LC_ALL": "de_DE.UTF-8", "LANG": "tr_TR.UTF-8", "LC_NUMERIC": "de_DE.UTF-8"},
    "another day": {"TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1"},
    "no home": {
        "HOME": None,
        "XDG_CACHE_HOME": "/proc/nothing",
        "XDG_CONFIG_HOME": None,
        "USER": None,
        "PYTHONHASHSEED": "2",
    },
}


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("speedup", *MODEL, "--family", "all", "--sparsity", "0.25", "--figure", "out/s.svg", "--json"),
    ("speedup", *MODEL, "--family", "depth,width", "--sparsity", "0.25,0.5"),
    ("explain", *MODEL, "--family", "width", "--sparsity", "0.3", "--figure", "out/e.pdf"),
    ("pareto", "llama-2-7b", "--hardware", "a100"),
    *(WRITERS[what] for what in ("csv", "import", "fit", "sweep")),
)

SCRIPT = """
import contextlib, io, json, sys
from calibration.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["prunesim", *words]
    # a sweep says how long it took
    with contextlib.redirect_stdout(io.StringIO()) if words[0] == "sweep" else contextlib.nullcontext():
        try:
            main()
        except SystemExit as end:
            assert not end.code, words
"""


def _everything(folder: Path, surroundings: Mapping[str, str | None]) -> dict[str, bytes]:
    """What a set of commands prints and writes, by file; all in one process."""
    (folder / "out").mkdir(parents=True)
    (folder / "grid.yaml").write_text(GRID)
    (folder / "t.csv").write_text(TABLE)
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), **surroundings}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)],
        cwd=folder,
        capture_output=True,
        timeout=170,
        env={name: value for name, value in environment.items() if value is not None},
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    return {"printed": done.stdout} | {p.name: p.read_bytes() for p in (folder / "out").iterdir()}


@pytest.mark.slow
def test_surroundings_change_no_byte(place: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        cases = [{}, *SURROUNDINGS.values()]
        first, *others = pool.map(_everything, [place / str(i) for i in range(len(cases))], cases)
    assert sorted(Path(name).suffix for name in first) == [
        "",
        ".csv",
        ".npz",
        ".parquet",
        ".parquet",
        ".pdf",
        ".svg",
        ".yaml",
    ]
    assert len(first["printed"]) > 5000
    for name, found in zip(SURROUNDINGS, others):
        assert found.keys() == first.keys(), name
        assert not [key for key in first if found[key] != first[key]], name


# -- two at a time ----------------------------------------------------------------------------------------------------------------


def _together(place: Path, *commands: tuple[str, ...]) -> list[tuple[int, bytes, list[str]]]:
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda words: run(words, place), commands))


@pytest.mark.slow
def test_two_fits_into_one_file_leave_a_whole_profile(place: Path) -> None:
    (place / "u.csv").write_text(TABLE.replace("\n1,", "\n2,"))
    fit = ("fit", "t.csv", "--hardware", "h100", "-o", "out/p.yaml")
    ended = _together(place, fit, (fit[0], "u.csv", *fit[2:]), fit)
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    assert load_hardware(place / "out/p.yaml").section("gemm", "bf16").status == "calibrated"
    assert len(list((place / "out").iterdir())) == 2  # the profile and the one set of arrays that it names


@pytest.mark.slow
def test_two_sets_of_figures_into_one_folder_leave_whole_files(place: Path) -> None:
    words = ("figures", "--only", "speedup,taxonomy", "--hardware", "h100", "--format", "svg", "-o", "out")
    ended = _together(place, words, words)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert sorted(p.name for p in (place / "out").iterdir()) == ["captions.md", "speedup.svg", "taxonomy.svg"]
    for name in ("speedup.svg", "taxonomy.svg"):
        assert (place / "out" / name).read_text(encoding="utf-8").rstrip().endswith("</svg>")


@pytest.mark.slow
def test_two_imports_into_one_file_leave_a_whole_table(place: Path) -> None:
    words = ("import", "t.csv", "-o", "out/t.parquet")
    assert [status for status, _, _ in _together(place, words, words, words)] == [0, 0, 0]
    assert len(import_table(place / "out/t.parquet").records) == TABLE.count("\n") - 1


def test_a_second_quality_run_stops_at_once(tmp_path: Path) -> None:
    path = tmp_path / "q.csv.partial.jsonl"
    with Results(path, {"model": "a"}) as first:
        first.add("depth", 0.25, 0.25, [1.0])
        with pytest.raises(InputError, match="another process is writing"):
            Results(path, {"model": "a"})
        first.add("depth", 0.5, 0.5, [2.0])
    path.write_bytes(path.read_bytes()[:-9])  # the second point was cut short by a kill
    with Results(path, {"model": "a"}) as again:
        assert list(again.points) == [("depth", 0.25)]
        again.add("depth", 0.5, 0.5, [3.0])
    with Results(path, {"model": "a"}) as last:
        assert last.points["depth", 0.5]["losses"] == [3.0]
