"""All figures and texts of a state, as the page and the report show them."""

from __future__ import annotations

from simulator.explore import markup
from simulator.explore.answer import answer, winners
from simulator.explore.chart import Chart, message
from simulator.explore.chart_crossover import crossover_chart
from simulator.explore.chart_roofline import roofline_chart
from simulator.explore.chart_speedup import speedup_chart
from simulator.explore.chart_waterfall import waterfall_chart
from simulator.explore.commands import commands
from simulator.explore.state import State
from simulator.figures.style import label
from simulator.units import percent

CARDS = (
    ("speedup", "Speedup over sparsity"),
    ("roofline", "Roofline"),
    ("waterfall", "Loss waterfall"),
    ("crossover", "Crossover map"),
)
"""Figures by name, with their titles."""


def charts(state: State, most: int) -> dict[str, Chart]:
    """The figures of a state but the map.

    >>> sorted(charts(State(), 3))
    ['roofline', 'speedup', 'waterfall']
    """
    found = answer(state)
    why = found.refused or next((n for n in found.notes if n.startswith(state.detail)), "nothing to draw")
    return {
        "speedup": speedup_chart(found.table.records, state.detail, state.at, most=most, refused=found.refused),
        "roofline": roofline_chart(found.details, most=most, refused=why),
        "waterfall": waterfall_chart(found.details, most=most, refused=why),
    }


def map_chart(state: State, most: int) -> Chart:
    """The map of a state."""
    cells = winners(state)
    if cells.refused:
        return message(answer(state).refused or cells.refused)
    return crossover_chart(cells, state.batch, state.seq, most=most)


def texts(state: State) -> dict[str, str]:
    """What is text, as HTML by the element it goes into."""
    found = answer(state)
    detail = f"{label(state.detail)} at {percent(state.at)}"
    return {
        "title": markup.title(found),
        "facts": markup.facts_html(found),
        "notes": markup.notes_html(found),
        "table": markup.table_html(found, state.detail, state.at),
        "commands": markup.commands_html(commands(state, found)),
        "about-speedup": f"Bands: {percent(state.setting.level)} interval. Black lines: bounds of {label(state.detail)}.",
        "about-roofline": f"GEMMs of the layers, dense (hollow) and with {detail} (filled), on the datasheet roofline.",
        "about-waterfall": markup.conclusions_html(found),
        "about-crossover": f"Fastest of the families chosen at {percent(state.at)}, {state.phase}. Equal sparsity is not equal quality.",
    }
