"""Commands that import, measure, fit and validate: entry points of ``prunesim`` (group
``prunesim.commands`` of setup.cfg), which :mod:`simulator.cli.program` finds by name.

Same rules as :mod:`simulator.cli`: thin commands, and nothing heavy imported before a command needs
it.
"""
