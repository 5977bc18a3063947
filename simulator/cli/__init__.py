"""The command line: ``prunesim``. A thin layer that reads options, calls one function of the library and prints what it
returns.

Data goes to standard output, messages and progress to standard error. Exit status: 0 done; 2 bad input, said in one
line; 1 failed (a file that cannot be written, a program error). Nothing heavy is imported before a command needs it;
:mod:`simulator.cli.program` itself is imported late, so that the program answers signals from its start.
"""

from __future__ import annotations

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Parameters
    ----------
    arguments : sequence of str
        What follows the name of the program.

    Returns
    -------
    int
        The exit status: 0, 2 for bad input, 1 for a failure, 130 when interrupted.
    """
    from simulator.cli import program

    return program.run(arguments)


def main() -> None:
    """Entry point of the ``prunesim`` command."""
    from simulator.start import start

    start("simulator.cli.program")
