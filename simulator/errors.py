"""Errors a user can mend: one line that says what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a person. The command line prints its one line and exits with 2."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is not among the known ones, with the closest of them.

    >>> str(unknown("GPU", "h10", ["h100", "a100"]))
    "GPU 'h10' is unknown; did you mean h100 or a100? Known: a100, h100"
    """
    known = sorted(choices)
    close = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return InputError(f"{kind} {str(name)!r} is unknown; {hint}Known: {', '.join(known)}")
