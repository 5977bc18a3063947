"""Errors that a user can fix: one line with the place, the expected value and the given value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Invalid input from a user; the command line prints its one line and exits with status 2.

    Parameters
    ----------
    message : str
        Text of the error. It becomes one line of printable characters, as it can quote any input.

    Examples
    --------
    >>> import simulator
    >>> try:
    ...     simulator.load_hardware("h10_sxm")
    ... except InputError as error:
    ...     print(str(error)[:47])
    GPU 'h10_sxm' is unknown; did you mean h100_sxm
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


def one_line(text: str, most: int = 4000) -> str:
    """Return a text as one printable line of at most ``most`` characters. Blanks replace line ends
    and tabs, escapes replace other unprintable characters. The middle of a long text is omitted."""
    text = _cut(text, most)
    if text.isprintable():
        return text
    shown = (
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )
    return _cut(" ".join(part for part in "".join(shown).split(" ") if part), most)


def _cut(text: str, most: int) -> str:
    return (
        text if len(text) <= most else f"{text[: (most - 4) // 2]} ... {text[-((most - 5) // 2) :]}"
    )


def unknown(
    kind: str, name: str, choices: Iterable[str], listed: Iterable[str] = (), way: str = ""
) -> InputError:
    """Return the error for a name that is not one of ``choices``, with the closest names.
    ``listed`` replaces ``choices`` in the list of known names, if choices contain aliases. ``way``
    is a sentence that states what to do."""
    known, given = sorted(choices), one_line(str(name), 80)
    # an id can begin with its owner
    parts = dict.fromkeys((given.lower(), given.lower().rsplit("/", 1)[-1]))
    close = next(filter(None, (_nearest(part, known) for part in parts)), [])
    hint = f"; did you mean {' or '.join(close)}? " if close else ". " if way else "; "
    hint += f"{way} " if way else ""
    return InputError(
        f"{kind} {given!r} is unknown{hint}Known: {', '.join(sorted(set(listed)) or known)}"
    )


def _nearest(given: str, known: Sequence[str]) -> list[str]:
    """Return at most three similar names. If the nearest begins alike, so do all, as other letters
    are another family of GPUs (an l40 is not a 4090)."""
    close = difflib.get_close_matches(given, known, n=6, cutoff=0.5)
    alike = [name for name in close if name[0] == given[:1]]
    return (alike if alike[:1] == close[:1] else close)[:3]


def needs_extra(what: str, extra: str, package: str, more: str = "") -> InputError:
    """Return the error for a missing package of an optional extra; extras are installed from a
    checkout."""
    install = f'pip install -e ".[{extra}]"{more}'
    return InputError(
        f'{what} needs the extra "{extra}" ({package} is not installed): in the checkout of'
        f" prunesim, {install}"
    )
