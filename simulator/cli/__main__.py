"""``python -m simulator.cli``: the same as the ``prunesim`` command."""

from simulator.cli import main

main()
