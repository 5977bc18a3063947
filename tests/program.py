"""The program as it is typed: in this process (``cli``), or in one of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

BESIDE = ("note: ", "status: ")
"""How lines of standard error begin that are neither errors nor warnings."""


class Program:
    """Runs a line as a shell would split it; calls give standard output and error, and check the
    status."""

    def __init__(self, run: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.capsys = run, capsys

    def __call__(self, line: str | Sequence[str], status: int = 0) -> tuple[str, str]:
        code = self.run(shlex.split(line) if isinstance(line, str) else list(line))
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err or os.environ.get("FORCE_COLOR")  # no terminal, no codes
        assert code == status, (line, out, err)
        return out, err

    def out(self, line: str) -> str:
        """Standard output of a line that succeeds."""
        return self(line)[0]

    def json(self, line: str) -> Any:
        """What a line prints as JSON, which has no NaN and no infinity."""
        return json.loads(self.out(f"{line} --json"), parse_constant=_refuse)

    def refused(self, line: str | Sequence[str], lists: bool = False) -> str:
        """The one line of bad input, with status 2; on standard output where a command lists what
        it found."""
        out, err = self(line, 2)
        said = [
            text
            for text in (err or (out if lists else "")).splitlines()
            if not text.startswith(BESIDE)
        ]
        assert len(said) == 1, (line, out, err)
        assert lists or (out == "" and said[0].startswith("prunesim: "))
        return said[0]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Program:
    """The program, in this process."""
    from simulator.cli import run

    return Program(run, capsys)


def run_python(
    arguments: Sequence[str], folder: Path = ROOT, **options: Any
) -> tuple[int, bytes, list[str]]:
    """Status, standard output and the lines of standard error that are no notes, of a process of
    its own.

    ``shell`` stands behind the command (a redirection), ``environment`` is added to this one's
    (None: taken away).
    """
    shell, environment = options.pop("shell", ""), options.pop("environment", {})
    settings = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), **environment}
    words = ["bash", "-c", f'set -o pipefail; "$0" "$@" {shell}', sys.executable, *arguments]
    done = subprocess.run(
        words if shell else words[3:],
        cwd=folder,
        capture_output=True,
        timeout=170,
        env={name: value for name, value in settings.items() if value is not None},
        **options,
    )
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    return done.returncode, done.stdout, [line for line in lines if not line.startswith(BESIDE)]
