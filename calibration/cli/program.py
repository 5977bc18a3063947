"""The whole command line: ``prunesim`` with the commands of the simulator and those that import, measure, fit and
validate.

Same rules as :mod:`simulator.cli`: thin commands, exit status 0, 2 for bad input, 1 for a failure, and nothing heavy
imported before a command needs it.
"""

from __future__ import annotations

from calibration.cli import calibrate, compare, figures, fit, import_, measure, paper, quality, upper_bound, validate
from simulator.cli import app, run

__all__ = ["app", "run"]

app.command("import")(import_.command)
app.command("measure")(measure.command)
app.command("fit")(fit.command)
app.command("validate")(validate.command)
app.command("calibrate")(calibrate.command)
app.command("upper-bound")(upper_bound.command)
app.command("compare")(compare.command)
app.command("figures")(figures.command)
app.command("paper")(paper.command)
app.command("quality")(quality.command)
