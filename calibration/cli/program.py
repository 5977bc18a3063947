"""The whole command line: ``prunesim`` with the commands of the simulator and those that import, measure, fit and
validate.

Same rules as :mod:`simulator.cli`: thin commands, exit status 0, 2 for bad input, 1 for a failure, and nothing heavy
imported before a command needs it.
"""

from __future__ import annotations

from simulator.cli import COMMANDS, app, run

__all__ = ["app", "run"]

COMMANDS.update(
    {
        "import": "calibration.cli.import_:command",
        "measure": "calibration.cli.measure:command",
        "fit": "calibration.cli.fit:command",
        "validate": "calibration.cli.validate:command",
        "calibrate": "calibration.cli.calibrate:command",
        "upper-bound": "calibration.cli.upper_bound:command",
        "compare": "calibration.cli.compare:command",
        "figures": "calibration.cli.figures:command",
        "paper": "calibration.cli.paper:command",
    }
)
