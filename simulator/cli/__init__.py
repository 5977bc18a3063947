"""Provide the command line ``prunesim``: each command reads options, calls one library function and
prints its result.

Data goes to standard output, messages and progress to standard error. Exit status: 0 done; 2
invalid input (one-line message); 1 failed (a file that cannot be written, a program error).
Commands import large packages only if needed.
"""

from __future__ import annotations

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """Run one command line, without the name of the program; return its exit status, 130 if
    interrupted."""
    from simulator.cli import program

    return program.run(arguments)


def main() -> None:
    """Run the ``prunesim`` command (its entry point)."""
    from simulator.start import start

    start("simulator.cli.program")
