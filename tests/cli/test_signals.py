"""Signals: one line and a status of its own at any moment, and workers that end with the
program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grids import GRID

from simulator.cli import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")

ROOT = Path(__file__).resolve().parents[2]
ENDS = {
    signal.SIGINT: (130, "prunesim: interrupted\n"),
    signal.SIGTERM: (143, "prunesim: terminated\n"),
}

AT_CALL = """
import importlib, os, sys
from simulator.cli import main

place, number = sys.argv[1], int(sys.argv[2])
module, _, name = place.rpartition(".")
module = importlib.import_module(module)
call = getattr(module, name)

def signalled(*arguments, **options):
    os.kill(os.getpid(), number)
    return call(*arguments, **options)

setattr(module, name, signalled)
sys.argv = ["prunesim", "speedup", "llama-3.2-1b", "--hardware", "h100", "--family", "depth", "--sparsity", "0.25"]
main()
"""

MOMENTS = (
    "cli.program.program",
    "cli.parsing.fractions",
    "prediction.table.request_results",
    "cli.render.conclude",
)


def test_an_interrupt_while_an_extension_module_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def imported(*_: Any) -> None:  # as pybind11 reports an exception of a module's start
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("simulator.cli.program.program", imported)
    assert (run(["speedup"]), capsys.readouterr().err) == ENDS[signal.SIGINT]


SWEEP = """
import sys
from simulator.prediction import sweep
from simulator.cli import main

def compute_part(*piece):
    import time
    print("ready", flush=True)
    time.sleep(60)

sweep.compute_part = compute_part  # also in workers, which import this module
if __name__ == "__main__":
    sys.argv = ["prunesim", "sweep", "grid.yaml", "-o", "rows", "--jobs", "2"]
    main()
"""


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_of_a_command_is_one_line(
    moment: str, number: signal.Signals, python: Any
) -> None:
    status, out, lines = python(["-c", AT_CALL, f"simulator.{moment}", str(int(number))])
    assert (status, "".join(f"{line}\n" for line in lines), out) == (*ENDS[number], b"")


@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["Ctrl-C", "kill"]
)
def test_workers_end_with_the_program_and_without_a_word(
    number: signal.Signals, to_group: bool, tmp_path: Path
) -> None:
    psutil, _ = pytest.importorskip("psutil"), pytest.importorskip("pyarrow")
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "run.py").write_text(SWEEP)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, start_new_session=True, **pipes
    ) as process:
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=30)  # a worker sleeps for 60 s
    assert (process.returncode, said) == ENDS[number]
    _, alive = psutil.wait_procs(children, timeout=5)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)
    assert not (tmp_path / "rows").exists()  # nothing to go on with


HALF_WRITTEN = """
import os, signal, sys, threading, time
from simulator.prediction import sweep
from simulator.cli import main

def end(parent):
    time.sleep(0.5)  # by now, the main thread waits for room in the pipe
    os.kill(parent, signal.SIGCONT)
    os.kill(os.getpid(), signal.SIGKILL)

def compute_part(*piece):
    parent = os.getppid()
    os.kill(parent, signal.SIGSTOP)  # so that it reads nothing yet
    threading.Thread(target=end, args=(parent,)).start()
    return bytes(100_000_000)

sweep.compute_part = compute_part  # also in workers, which import this module
if __name__ == "__main__":
    sys.argv = ["prunesim", "sweep", "grid.yaml", "-o", "rows", "--jobs", "2"]
    main()
"""


def test_a_worker_that_ends_while_it_sends_a_part_is_not_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "run.py").write_text(HALF_WRITTEN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "run.py"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("prunesim: a worker process ended early (")
    assert done.stderr.endswith("finished parts are kept: run the same command again\n")


AT_EXIT = """
import os
import simulator.cli.program as program
from simulator.start import start

class Late:
    def __del__(self, kill=os.kill, own=os.getpid()):
        kill(own, {number})

late = Late()
program.run = lambda words: 0
start('simulator.cli.program')
"""


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_after_the_work_changes_nothing(number: signal.Signals, python: Any) -> None:
    """Python restores the default actions while it ends, for a tenth of a second with large
    modules."""
    assert python(["-c", AT_EXIT.format(number=int(number))]) == (0, b"", [])


IGNORED = """
import os
import simulator.cli.program as program
from simulator.start import start

class Freed:
    def __del__(self):
        os.kill(os.getpid(), {number})
        os.getpid()

def run(words):
    Freed()
    return 0

program.run = run
start('simulator.cli.program')
"""


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_in_a_destructor_is_not_lost(number: signal.Signals, python: Any) -> None:
    status, line = ENDS[number]
    assert python(["-c", IGNORED.format(number=int(number))]) == (status, b"", [line.strip()])
