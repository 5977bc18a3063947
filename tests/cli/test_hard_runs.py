"""Whole runs of the program in places that are hard on programs: full disks, closed streams, odd
locales, no home."""

from __future__ import annotations

import functools
import json
import resource
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from simulator.hardware.library import load_hardware

GRID = (
    "models: [llama-3.2-1b]\nhardware: [h100]\nfamilies: [depth]\nsparsities: [0.25]\n"
    "phases: [decode]\nbatches: [1]\nseqs: [2048]\n"
)
TABLE = "m,n,k,latency_us\n" + "".join(
    f"{m},{n},4096,{30 + m * n / 4e4:.3f}\n"
    for m in (1, 4, 16, 64, 256, 1024)
    for n in (1024, 2048, 4096, 8192)
)
DEPTH = "speedup llama-3.2-1b --hardware h100 --family depth --sparsity 0.25"
WRITERS = {
    "csv": f"{DEPTH} --csv out/s.csv",
    "figure": f"{DEPTH} --figure out/s.pdf",
    "figures": "figures llama-3.1-8b --only speedup --hardware h100 --format png -o out",
    "report": f"report {DEPTH.split(' ', 1)[1]} -o out/r.html",
    "sweep": "sweep grid.yaml -o out/rows",
    "fit": "fit t.csv --hardware h100 -o out/p.yaml",
    "validate": "validate h100 h100_sxm/collective/trtllm --markdown out/v.md",
}
"""A command for every kind of file that is written."""

PRINTERS = {"table": DEPTH, "help": "--help", "show": "hardware show h100"}
every_printer = pytest.mark.parametrize("printer", PRINTERS)


def fill(folder: Path) -> None:
    """Inputs, and ``out`` to write to."""
    (folder / "out").mkdir(parents=True)
    (folder / "grid.yaml").write_text(GRID)
    (folder / "t.csv").write_text(TABLE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pyarrow")
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prunesim(python: Any, place: Path) -> Any:
    """Runs a line in a process of its own."""
    return lambda line, **options: python(["-m", "simulator.cli", *line.split()], place, **options)


SLOW_WRITERS = [
    pytest.param(what, marks=pytest.mark.slow) for what in ("figures", "fit", "validate")
]


@pytest.mark.parametrize("what", ["csv", "figure", "sweep", *SLOW_WRITERS])
def test_a_full_disk_leaves_what_was_there(what: str, place: Path, prunesim: Any) -> None:
    """No file may grow beyond some bytes: what is written beyond fails, as on a full disk."""
    limit = 200 if what == "csv" else 1024
    target = place / (WRITERS[what].split()[-1] if what != "figures" else "out/speedup.png")
    if what != "sweep":  # it does not write over a file in any case
        target.write_bytes(b"old")
    before = {p.name: p.read_bytes() for p in (place / "out").iterdir()}
    small = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    # a compiled module would be cut off, and stay for other tests
    unwritten = {"PYTHONDONTWRITEBYTECODE": "1"}
    status, _, lines = prunesim(WRITERS[what], preexec_fn=small, environment=unwritten)
    assert (status, len(lines)) == (1, 1), lines
    assert "File too large" in lines[0]
    assert "out/" in lines[0]
    assert {p.name: p.read_bytes() for p in (place / "out").iterdir()} == before


@every_printer
def test_output_to_a_full_disk_fails_in_one_line(printer: str, prunesim: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    status, _, lines = prunesim(PRINTERS[printer], shell="> /dev/full")
    assert (status, lines) == (1, ["prunesim: No space left on device"])


@every_printer
@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "| head -c 1 > /dev/null"])
def test_closed_streams_are_quiet(printer: str, redirection: str, prunesim: Any) -> None:
    status, _, lines = prunesim(PRINTERS[printer], shell=redirection)
    assert status in ((0, 1) if "head" in redirection else (0,))
    assert not lines


@pytest.mark.parametrize("what", WRITERS)
@pytest.mark.parametrize(
    "target", ["/proc/nothing/x.{}", "/dev/null/x.{}", "missing/x.{}", "x\0.{}", "x" * 300 + ".{}"]
)
def test_places_that_cannot_be_written_to(what: str, target: str, place: Path, cli: Any) -> None:
    *words, last = WRITERS[what].split()
    path = target.format(Path(last).suffix[1:] or "png")
    before = sorted(place.rglob("*"))
    if what == "figures" and path.startswith("missing/"):
        cli([*words, path])  # folders of a set of figures are made
        return
    status = cli.run([*words, path])
    lines = [
        line
        for line in cli.capsys.readouterr().err.splitlines()
        if not line.startswith(("note: ", "status: "))
    ]
    assert status in (1, 2), lines
    assert len(lines) == 1, lines
    assert lines[0].isprintable()
    assert sorted(place.rglob("*")) == before


C_LOCALE = {
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": None,
}
NO_HOME = {"HOME": None, "XDG_CACHE_HOME": "/proc/nothing", "XDG_CONFIG_HOME": None, "USER": None}
SURROUNDINGS: Mapping[str, Mapping[str, str | None]] = {
    "these": {},
    "the C locale without UTF-8": C_LOCALE,
    "a locale of decimal commas": {
        "LC_ALL": "de_DE.UTF-8",
        "LANG": "tr_TR.UTF-8",
        "LC_NUMERIC": "de_DE.UTF-8",
    },
    "another day and no home": {**NO_HOME, "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1"},
}

COMMANDS = [
    "speedup llama-3.2-1b --hardware h100 --family all --sparsity 0.25 --figure out/s.svg --json",
    "speedup llama-3.2-1b --hardware h100 --family depth,width --sparsity 0.25,0.5",
    "explain llama-3.2-1b --hardware h100 --family width --sparsity 0.3 --figure out/e.pdf",
    "pareto llama-2-7b --hardware a100",
    *(WRITERS[what] for what in ("csv", "fit", "sweep")),
]

SCRIPT = """
import contextlib, io, json, sys
import calibration.fit.gemm
from simulator.cli import main
calibration.fit.gemm.FEW_FOLDS = 3  # as the fixture three_folds
for line in json.loads(sys.argv[1]):
    sys.argv = ["prunesim", *line.split()]
    # a sweep says how long it took
    with contextlib.redirect_stdout(io.StringIO()) if "sweep" in line else contextlib.nullcontext():
        try:
            main()
        except SystemExit as end:
            assert not end.code, line
"""


@pytest.mark.slow
def test_surroundings_change_no_byte(place: Path, python: Any) -> None:
    def everything(name: str) -> dict[str, bytes]:
        """What a set of commands prints and writes, by file; all in one process."""
        fill(place / name)
        arguments = ["-c", SCRIPT, json.dumps(COMMANDS)]
        status, out, lines = python(arguments, place / name, environment=SURROUNDINGS[name])
        assert status == 0, lines
        return {"printed": out} | {
            p.name: p.read_bytes() for p in (place / name / "out").rglob("*") if p.is_file()
        }

    with ThreadPoolExecutor(2) as pool:
        first, *others = pool.map(everything, SURROUNDINGS)
    suffixes = sorted(Path(name).suffix for name in first)
    assert suffixes == ["", ".csv", ".npz", ".parquet", ".pdf", ".svg", ".yaml"]
    assert len(first["printed"]) > 5000
    for name, found in zip(list(SURROUNDINGS)[1:], others):
        assert found.keys() == first.keys(), name
        assert not [key for key in first if found[key] != first[key]], name


def _together(prunesim: Any, *lines: str) -> None:
    with ThreadPoolExecutor(len(lines)) as pool:
        ended = list(pool.map(prunesim, lines))
    assert [status for status, _, _ in ended] == [0] * len(lines), ended


@pytest.mark.slow
def test_two_fits_into_one_file_leave_a_whole_profile(place: Path, prunesim: Any) -> None:
    (place / "u.csv").write_text(TABLE.replace("\n1,", "\n2,"))
    _together(prunesim, WRITERS["fit"], WRITERS["fit"].replace("t.csv", "u.csv"), WRITERS["fit"])
    assert load_hardware(place / "out/p.yaml").section("gemm", "bf16").status == "calibrated"
    # the profile and the one set of arrays that it names
    assert len(list((place / "out").iterdir())) == 2
