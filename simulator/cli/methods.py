"""``prunesim methods``: list pruning methods, show one, check a file, write one to start from."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from simulator.cli import options, render
from simulator.cli.options import arg, opt, option
from simulator.display import as_plain
from simulator.request import SETTINGS

if TYPE_CHECKING:
    from simulator.prediction.method_check import Pair, PhaseCheck
    from simulator.pruning._methods import Method


class _Group(TyperGroup):
    """Commands, of which ``list`` and ``show`` need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if ctx.resilient_parsing:  # a shell completes a word
            return super().parse_args(ctx, args)
        if not words and not {"-h", "--help"}.intersection(args):
            args = ["list", *args]
        elif words and words[0] not in self.commands:
            args = ["show", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        names = self.commands["show"].params[0].shell_complete(ctx, incomplete)
        return [*super().shell_complete(ctx, incomplete), *names]


methods = typer.Typer(
    cls=_Group,
    help="Pruning methods: list published ones, show NAME or FILE, check a file, write one.",
)
_Name = Annotated[str, arg("NAME", "A published method, or a method file.", "--method")]


@methods.command("list")
def _list_methods(as_json: options.Json = False) -> None:
    """List published pruning methods.

    Each has its family, removed work and paper. Use their names with --method of speedup and
    explain, and as methods: in the grid of a sweep.
    """
    from simulator.pruning._methods import METHODS

    found = list(METHODS.values())
    if as_json:
        render.show_json([_plain(m) for m in found])
        return
    columns = render.columns(
        found,
        ("<method", "name"),
        ("<family", "family"),
        ("<arXiv", "arxiv"),
    )
    room = render.width() - render.table_width(columns) - 2
    if room >= 24:
        what = [textwrap.shorten(m.what, room, placeholder="...") for m in found]
        columns.insert(2, render.Column("removed", what, right=False))
    render.show(columns)
    print()
    render.say(
        "prunesim methods NAME shows details; widths and ranks are rounded as in the family."
        " methods new --like NAME prints the file of a method, to describe another"
    )


@methods.command("show")
def _show_methods(name: _Name, as_json: options.Json = False) -> None:
    """Show a method in full; "prunesim methods NAME" is the same."""
    from simulator.pruning._methods import load_method

    method = load_method(name)
    plain = _plain(method)
    if as_json:
        render.show_json([plain])
        return
    if (budget := method.budget) is not None:
        plain["sparsities"] = (
            f"follow from the length: it keeps {budget:,} tokens; give no --sparsity"
        )
    for key, value in plain.items():
        text = f"{key + ':':<12}{_text(value)}"
        print(textwrap.fill(text, render.width(), subsequent_indent=" " * 12))


def _plain(m: Method) -> dict[str, Any]:
    names = ("name", "family", "what", "options", "sparsities", "phases", "arxiv")
    changes = [f"{one.operator} {one.axis} {one.stays}" for one in m.description.dynamic]
    adds = [f"{one.kind} {one.role} {one.place}" for one in m.description.adds]
    described = {"changes": changes, "adds": adds} if changes or adds else {}
    return {**{name: getattr(m, name) for name in names}, **described}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name}={option}" for name, option in value.items()) or "defaults"
    return ", ".join(str(v) for v in value) or "-"


@methods.command("new")
def _new_methods(
    like: Annotated[
        str, opt("--like", "NAME", "The published method or the family to start from.")
    ],
    as_json: options.Json = False,
) -> None:
    """Print the file of a published method or family, to change it: redirect it into a file."""
    from simulator.pruning._templates import template

    if as_json:
        render.show_json({"like": like, "file": template(like)})
    else:
        print(template(like), end="")


_H100 = options.Devices("h100")
_ONE_PASS = [
    name for name in SETTINGS if name not in ("new_tokens", "ideal", "dense_s", "power_limit")
]
_RUN: options.Run = options.run_options(*_ONE_PASS, phase=None)


@methods.command("check")
@options.expanded()
def _check_methods(
    file: Annotated[str, arg("FILE", "YAML file of a method, or a published method.")],
    model: str = option("MODEL", "Name of a model, or its config.json.", "llama-3.1-8b"),
    devices: options.Devices = _H100,
    sparsity: float | None = option("X", "Value of s. Default: the first of the paper, or 0.5."),
    run: options.Run = _RUN,
    as_json: options.Json = False,
) -> None:
    """Check a method file: M, N and K, removed and added work, kernels, warnings.

    Each problem of the file is one line; the exit status is 2 when there is any. Otherwise prints
    each operator that changes: M, N and K dense and pruned (means over the changed layers), the
    FLOPs, bytes and predicted time that the pass gains or loses, and how the time of each kernel is
    known.
    """
    from simulator.prediction.method_check import check_method, problems_of

    if problems := problems_of(file):
        render.checked(file, problems, as_json)
    found = check_method(file, model, devices.one, sparsity, **run.asked().settings)
    if as_json:
        render.show_json(as_plain(found))
        return
    at = "" if found.sparsity is None else f" at s = {found.sparsity:g}"
    for phase in found.phases:
        r = phase.result
        request = f"{r.phase}, batch {r.batch}, seq {r.seq}, {r.model} on {r.hardware}, {r.engine}"
        bound = f"roofline bound {render.ratio(r.roofline_bound)}"
        render.conclude(f"{found.method}{at}, {request}: {render.interval(r)}x, {bound}x")
        if phase.operators:
            _print_phase(phase, found.layers)
    for line in found.warnings:
        render.say(f"warning: {line}", "  ")
    if not found.warnings:
        print("no warning")


def _print_phase(phase: PhaseCheck, layers: int) -> None:
    columns = render.columns(
        phase.operators,
        ("<operator", "operator"),
        ("M", "m", _sizes),
        ("N", "n", _sizes),
        ("K", "k", _sizes),
        ("FLOP", lambda r: _signed(r.flops, partial(render.rate, unit=""))),
        ("bytes", lambda r: _signed(r.bytes, render.size)),
        ("time", lambda r: _signed(r.seconds, render.seconds)),
        (f"of {layers} layers", lambda r: r.layers or "-"),
    )
    render.show(render.narrowed(columns, 6), "changed operators, pruned less dense")
    users: dict[tuple[str, str], dict[str, None]] = {}
    for one in phase.operators:
        for item in one.kernels.items():
            users.setdefault(item, {})[one.operator] = None
    for (kernel, known), names in users.items():
        render.say(f"{kernel} ({', '.join(names)}): {known}", "  ")
    if phase.cache_bytes[0] != phase.cache_bytes[1]:
        print("cache per device:", " to ".join(map(render.size, phase.cache_bytes)))
    render.say(f"unchanged: {', '.join(phase.unchanged) or 'none'}", "  ")
    print()


def _sizes(pair: Pair) -> str:
    before, after = (f"{size:.5g}" for size in pair)
    if not pair[0]:  # added, or no product
        return after if pair[1] else ""
    return before if before == after else f"{before} -> {after}"


def _signed(value: float, text: Callable[[float], str]) -> str:
    return f"{'+' if value > 0 else '-'}{text(abs(value))}" if value else "-"
