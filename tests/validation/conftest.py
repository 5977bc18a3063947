"""The fixture ``cli``, as in the tests of the program."""

from cli.conftest import cli

__all__ = ["cli"]
