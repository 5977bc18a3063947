"""Files to start a method from, of published methods and of families: :func:`template`."""

from __future__ import annotations

from pathlib import Path

from simulator.errors import unknown
from simulator.pruning import FAMILIES, Family
from simulator.pruning._methods import METHODS, method_file

_FOLDER = Path(__file__).parent / "families"  # what dynamic families do, as files


def template(like: str) -> str:
    """Return the text of a method file that does what a published method or a family does."""
    if like in METHODS:
        return method_file(like).read_text(encoding="utf-8")
    if like not in FAMILIES:
        raise unknown("method or family", like, [*METHODS, *FAMILIES], [*FAMILIES, *METHODS])
    family = FAMILIES[like]
    file = _FOLDER / f"{family.name}.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else _of_family(family)


def _of_family(family: Family) -> str:
    """Return a method file with a step of a family, whose options are comments."""
    fraction = "s" if family.default is None else f"{family.default:g}"
    lines = [f"method: my-{family.name.replace('_', '-')}", f'what: "{family.summary}"', "prune:"]
    lines.append(f"  - {family.name}: {fraction}")
    if family.targets:
        parts = ", ".join(f"{part}: {fraction}" for part in family.targets[:2])
        lines[-1] += f"    # or by part: {{{parts}}}; parts: {', '.join(family.targets)}"
    lines += [
        f"    # {name}: {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in family.options.items()
        if value is not None
    ]
    return "\n".join(lines) + "\n"
