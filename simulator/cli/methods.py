"""``prunesim methods``: list the published pruning methods of ``--method``."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, render
from simulator.cli.options import arg

if TYPE_CHECKING:
    from simulator.pruning._methods import Method

LEAST = 24
"""Characters of the narrowest column of removed work."""


def command(
    name: Annotated[str | None, arg("NAME", "One method, in full.", "--method")] = None, as_json: options.Json = False
) -> None:
    """List published pruning methods.

    Each has its family, removed work and paper. Use their names with --method of speedup and explain, and as methods:
    in the grid of a sweep.
    """
    from simulator.pruning._methods import METHODS, load_method

    found = list(METHODS.values()) if name is None else [load_method(name)]
    if as_json:
        render.show_json([_plain(m) for m in found])
    elif name is None:
        columns = render.columns(
            found, ("<method", lambda m: m.name), ("<family", lambda m: m.family), ("<arXiv", lambda m: m.arxiv)
        )
        room = render.width() - render.table_width(columns) - 2
        if room >= LEAST:
            what = [textwrap.shorten(m.what, room, placeholder="...") for m in found]
            columns.insert(2, render.Column("removed", what, right=False))
        render.show(columns)
        more = "prunesim methods NAME shows details; widths and ranks are rounded as in the family"
        print(f"\n{textwrap.fill(more, render.width())}")
    else:
        plain = _plain(found[0])
        if (budget := found[0].budget) is not None:
            plain["sparsities"] = f"follow from the length: it keeps {budget:,} tokens; give no --sparsity"
        for key, value in plain.items():
            text = f"{key + ':':<12}{_text(value)}"
            print(textwrap.fill(text, render.width(), subsequent_indent=" " * 12))


def _plain(m: Method) -> dict[str, Any]:
    names = ("name", "family", "what", "options", "sparsities", "phases", "models", "title", "arxiv")
    return {name: getattr(m, name) for name in names}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{name}={option}" for name, option in value.items()) or "defaults of the family"
    return ", ".join(str(v) for v in value) or "see the paper"
