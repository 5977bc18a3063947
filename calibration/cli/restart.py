"""Start the program again in a new process, to resume a run that its process could not finish.

A failed capture of a CUDA graph spoils its process only. The new process takes the place of the old one (``exec``),
which frees the memory of the GPU at once, and resumes from the records, where the operator is marked as unsupported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibration.measure.run import Outcome
    from calibration.runners.compare import ComparedCases

RESTARTS = "PRUNESIM_RESTARTS"
"""Environment variable with the number of restarts so far."""
MOST_RESTARTS = 3


def restart_if_needed(outcome: Outcome | ComparedCases, note: Callable[[str], None]) -> None:
    """Restart this program if a run needs a new process; the device and its records must be closed.

    Return if that is not needed, after :data:`MOST_RESTARTS`, and in a process that is another program, such as a
    notebook.
    """
    done = os.environ.get(RESTARTS, "0")
    count = int(done) if done.isdecimal() else MOST_RESTARTS
    if not outcome.needs_new_process or count >= MOST_RESTARTS or not _is_program(sys.argv[0]):
        return
    note(f"{outcome.stopped}; resuming in a new process")
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[RESTARTS] = str(count + 1)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_program(path: str) -> bool:
    """Whether a script is the command prunesim: installed, or run as ``python -m simulator.cli``."""
    return Path(path).stem == "prunesim" or Path(path).parts[-3:] == ("simulator", "cli", "__main__.py")
