"""``python -m calibration.cli``: the same as the ``prunesim`` command."""

from calibration.cli import main

main()
