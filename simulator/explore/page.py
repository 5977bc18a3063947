"""Build the page as HTML: a form with every control set to the state, texts, and frames for the figures.

Controls are plain form elements: labels, keyboard and screen readers work as in any form, and controls exist before a
script runs. Their values are the query of the address; the script in ``assets`` only copies them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from types import MappingProxyType

from simulator._version import __version__
from simulator.engines.engine import list_engines, load_engine
from simulator.explore.address import to_query
from simulator.explore.charts import CARDS
from simulator.explore.dropped import PREFIX, read_profile, read_token
from simulator.explore.state import ARITHMETIC, EXISTING, MOST_DEVICES, MOST_NEW_TOKENS, State, typed
from simulator.figures.style import label, style_of
from simulator.hardware.library import list_hardware, load_hardware
from simulator.models.library import list_models
from simulator.prediction.scenario import MAX_TOKENS
from simulator.pruning import FAMILIES
from simulator.pruning._methods import METHODS
from simulator.workload import DTYPES, PHASES

_SIGNS = dict(zip("osD^vPXdh*", ("●○", "■□", "◆◇", "▲△", "▼▽", "✚✚", "✖✖", "◆◇", "⬢⬡", "★☆")))
"""Markers of families as characters, filled and hollow."""

_BATCH = '<span class="batch">Batch</span><span class="concurrency">Concurrency</span>'

_MEASURED = "Time of the whole pass on a single GPU; narrows every interval"

_EXAMPLES = "width mlp=0.3 heads=0.2&#10;depth 0.25 + width 0.2"

PLOTLY = "/_dash-component-suites/plotly/package_data/plotly.min.js"
"""Path at which Dash serves Plotly."""


def page_html(state: State, texts: Mapping[str, str], parts: Mapping[str, str], own: Sequence[str] = ()) -> str:
    """Return the whole page; ``own`` are paths of profiles that can be selected.

    The controls show ``state``. ``texts`` are the texts as HTML by element (:func:`simulator.explore.markup.texts`,
    and the problems of the address), and ``parts`` the parts of a page that Dash supplies: metas, favicon, css,
    app_entry, config, scripts, renderer.
    """
    facts, notes = (f'<div id="{name}">{texts[name]}</div>' for name in ("facts", "notes"))
    cards = "".join(_card(name, escape(title), texts[f"about-{name}"]) for name, title in CARDS.items())
    return f"""<!doctype html>
<html lang="en">
<head>
{parts["metas"]}
<title>prunesim explore</title>
{parts["favicon"]}
{parts["css"]}
<script async src="{PLOTLY}"></script>
</head>
<body data-phase="{state.phase}">
<a class="skip" href="#results">Skip to the results</a>
<header class="bar"><h1>prunesim</h1><p>How much faster will a pruned LLM really be?</p></header>
<div class="shell">
<details class="settings" open><summary>Settings</summary>{_form(state, texts["note-prune"], own)}</details>
<main id="results" tabindex="-1">
<div id="problems" class="problems" role="alert">{texts["problems"]}</div>
<div class="summary">
<div class="head"><p id="title" class="title">{texts["title"]}</p>
<button type="button" data-pin title="Keep this setting to compare others with it">Pin as A</button></div>
{facts}{notes}
</div>
<div class="grid" id="grid" data-wide="{wide_cards(state)}">
<section class="card whole" id="pinned">{texts["pinned"]}</section>{cards}
<section class="card whole"><div class="head"><h2 id="h-table">Table</h2>
<button type="button" data-csv aria-label="Download the table as CSV">CSV</button></div>
<div id="table" class="table" tabindex="0" role="region" aria-labelledby="h-table">{texts["table"]}</div></section>
<section class="card whole"><div class="head"><h2>The same numbers from the command line</h2></div>
<div id="commands">{texts["commands"]}</div></section>
</div>
<p class="version">prunesim {__version__}</p>
<div hidden>{parts["app_entry"]}</div>
</main>
</div>
<footer>{parts["config"]}{parts["scripts"]}{parts["renderer"]}</footer>
</body>
</html>"""


def wide_cards(state: State) -> str:
    """Return which cards take the whole width: all, the waterfall and those after it, or none."""
    return "all" if len(state.gpus) > 1 else "waterfall" if state.scenario_versus else "no"


def _card(name: str, title: str, about: str) -> str:
    """Return a frame for a figure, with buttons that download it."""
    save = "".join(
        f'<button type="button" data-save="{name}" data-kind="{kind.lower()}" title="Download the figure as {kind}" '
        f'aria-label="Download {title} as {kind}">{kind}</button>'
        for kind in ("SVG", "PNG")
    )
    return (
        f'<section class="card" id="card-{name}"><div class="head"><h2 id="h-{name}">{title}</h2>{save}</div>'
        f'<div id="{name}" class="chart" role="img" aria-labelledby="h-{name} about-{name}"></div>'
        f'<div id="about-{name}" class="about">{about}</div></section>'
    )


# -- controls ----------------------------------------------------------------------------------------------------------


def _form(state: State, wrong: str, own: Sequence[str]) -> str:
    given = {"detail": {}, "model": {}, "gpu": {path: own_label("gpu", path) for path in own}, "pruned": {}}
    for control, value, text in own_options(state):
        given[control][value] = text
    names = {name: name for name in list_hardware()} | given["gpu"]
    gpus = _inputs("checkbox", "gpu", {name: escape(text) for name, text in names.items()}, state.gpus)
    families = _inputs("checkbox", "family", {name: _signed(name) for name in FAMILIES}, state.families)
    models = {name: name for name in list_models()} | given["model"]
    weights = {"": "as stored", **{name: name for name in DTYPES}}
    details = {name: label(name) for name in FAMILIES} | {EXISTING: "pruned model"} | given["detail"]
    prune, pin = escape("\n".join(state.prune)), escape(to_query(state.pin)) if state.pin is not None else ""
    engines = {name: load_engine(name).title for name in list_engines()}
    dense = _optional("dense", "Measured dense time (ms)", state.dense_ms, "not measured", _MEASURED)
    ttft = _optional("ttft", "First token (ms)", state.ttft_ms, "no limit", "Limit of the time to the first token")
    tpot = _optional("tpot", "Per token (ms)", state.tpot_ms, "no limit", "Limit of the time per output token")
    price = _optional("price", "Price of a GPU-hour", state.price, "none", "For the cost of a million output tokens")
    sparsities = ", ".join(map(repr, state.sparsities))
    at = f'<input type="number" id="at" name="at" min="0" max="0.99" step="0.05" value="{state.at!r}">'
    return f"""<form id="controls" autocomplete="off">
<fieldset><legend>Model</legend>
{_select("model", "Name", models, state.model)}
{_drop("model", "Open a model", "or drop it here: config.json, or a whole checkpoint (only its headers are read)")}
</fieldset>
<fieldset><legend>GPUs</legend>
<div class="checks" id="gpus">{gpus}</div>
{_drop("gpu", "Open a profile", "or drop your own here (YAML)")}
</fieldset>
<fieldset><legend>Workload</legend>
{_radios("phase", "Phase", {name: name for name in PHASES}, state.phase)}
<div class="pair">
{_number("batch", _BATCH, state.batch, MAX_TOKENS)}
{_number("seq", "Sequence", state.seq, MAX_TOKENS)}
</div>
<div class="pair">
{_select("dtype", "Arithmetic", {name: name for name in ARITHMETIC}, state.dtype)}
{_select("weights", "Weights", weights, state.weights)}
</div>
<div class="pair">
{_number("devices", "Tensor parallel", state.devices, MOST_DEVICES)}
{_number("new", "New tokens", state.new_tokens, MOST_NEW_TOKENS)}
</div>
{_select("engine", "Engine", dict(zip(engines, engines)), state.engine, engines)}
<div class="limits"><div class="pair">
{ttft}
{tpot}
</div>
{price}
</div>
{dense}
</fieldset>
<fieldset><legend>Pruning</legend>
<div class="checks families">{families}</div>
<label class="field" for="sparsity">Sparsities of the curves
<input type="text" id="sparsity" name="sparsity" spellcheck="false" value="{sparsities}"></label>
<label class="field" for="prune">Prunings, one per line
<textarea id="prune" name="prune" rows="3" spellcheck="false" placeholder="{_EXAMPLES}">
{prune}</textarea></label>
<div id="note-prune" class="error" role="alert">{wrong}</div>
{_methods()}
{_select("pruned", "Pruned model", {"": "none", **given["pruned"]}, state.pruned)}
{_drop("pruned", "Open one", "or drop a checkpoint here")}
</fieldset>
<fieldset><legend>In detail</legend>
{_select("detail", "Pruning", details, state.detail)}
<p class="hint">In waterfall, roofline, bounds and throughput; always drawn.</p>
<div class="pair">
<label class="field" for="at" title="Of families: in detail, over batch and in the map">Sparsity of families{at}</label>
{_select("versus", "Second engine", {"": "none", **dict(zip(engines, engines))}, state.versus, engines)}
</div>
{_radios("over", "Speedup over", {"batch": _BATCH, "seq": "Sequence"}, state.over)}
</fieldset>
<input type="hidden" name="pin" id="pin" value="{pin}">
</form>"""


def _optional(name: str, title: str, value: float | None, empty: str, hint: str) -> str:
    """Return a field for a positive number, which may be empty."""
    shown = f'placeholder="{empty}" title="{hint}" value="{typed(value)}"'
    field = f'<input type="number" id="{name}" name="{name}" min="0" step="any" {shown}>'
    return f'<label class="field" for="{name}">{title}{field}</label>'


def _methods() -> str:
    """Return a list of published methods; a choice is added to the prunings, at the sparsities of its paper."""
    options = '<option value="">add one</option>'
    for name, method in METHODS.items():
        texts = "\n".join(f"{name} {s:g}" for s in method.sparsities) or name
        options += f'<option value="{texts}">{name}: {label(method.family)}</option>'
    select = f'<select id="method" data-add="prune">{options}</select>'
    return f'<label class="field" for="method">Published method{select}</label>'


def own_options(state: State) -> list[tuple[str, str, str]]:
    """Return control, value and text of each choice that is not shipped: dropped files and texts of ``--prune``."""
    values = [("model", state.model), *(("gpu", gpu) for gpu in state.gpus), ("pruned", state.pruned)]
    files = [(control, v, own_label(control, v)) for control, v in values if v.startswith(PREFIX)]
    return [*files, *(("detail", text, text) for text in state.texts)]


def own_label(control: str, value: str) -> str:
    """Return the label of a model or profile that is not shipped."""
    if not value.startswith(PREFIX):
        return f"{load_hardware(value).label} ({value})" if control == "gpu" else value
    if control == "gpu":
        file, profile = read_profile(value)
        return f"{profile.label} ({file})"
    file, model = read_token(value)
    return f"{model.name} ({'checkpoint' if file in ('.', model.name) else file})"


def _drop(control: str, button: str, hint: str) -> str:
    """Return an area for dropped files, with a button that opens a file dialogue."""
    return (
        f'<div class="drop" data-into="{control}"><button type="button" data-open="{control}">{button}</button>'
        f'<span>{hint}</span></div><p id="note-{control}" class="error" role="alert"></p>'
    )


def _signed(name: str) -> str:
    """Return a family's name with its marker in its colour."""
    style = style_of(name)
    sign = _SIGNS[style.marker][style.hollow]
    return f'<span class="sign" aria-hidden="true" style="color:{style.color}">{sign}</span>{escape(label(name))}'


def _select(
    name: str, title: str, choices: Mapping[str, str], chosen: str, hints: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return a list; a hint is the hover text of a choice, and of the list while that choice is selected."""

    def hint(value: str) -> str:
        return f' title="{escape(hints[value])}"' if value in hints else ""

    options = "".join(
        f'<option value="{escape(value)}"{hint(value)}{" selected" if value == chosen else ""}>{escape(text)}</option>'
        for value, text in choices.items()
    )
    select = f'<select id="{name}" name="{name}">{options}</select>'
    return f'<label class="field" for="{name}">{title}{select}</label>'


def _inputs(kind: str, name: str, choices: Mapping[str, str], chosen: Iterable[str]) -> str:
    """Return check boxes or radio buttons; the texts are HTML."""
    return "".join(
        f'<label><input type="{kind}" name="{name}" value="{escape(value)}"{" checked" if value in chosen else ""}>'
        f"{text}</label>"
        for value, text in choices.items()
    )


def _radios(name: str, title: str, choices: Mapping[str, str], chosen: str) -> str:
    inner = _inputs("radio", name, {value: f"<span>{text}</span>" for value, text in choices.items()}, [chosen])
    shown = f'<span class="name" aria-hidden="true">{title}</span>'
    return f'<div class="radios" role="radiogroup" aria-label="{title}">{shown}<div>{inner}</div></div>'


def _number(name: str, title: str, value: int, most: int) -> str:
    attributes = f'min="1" max="{most}" step="1" inputmode="numeric"'
    number = f'<input type="number" id="{name}" name="{name}" {attributes} value="{value}">'
    return f'<label class="field" for="{name}">{title}{number}</label>'
