"""The page in the browser, which Streamlit runs: widgets make a request, and the page shows its
content.

The settings are in the address. A path in the address fills its field; no file is opened before a
click on a button.
"""

from __future__ import annotations

import base64
import contextlib
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st

from simulator.display import markdown_text
from simulator.engines.engine import list_engines, load_engine, split
from simulator.errors import InputError, one_line, unknown
from simulator.explore.content import Drawing, LoadContent, PageContent, commands, content
from simulator.files.csv import csv_text
from simulator.files.yaml import Problems
from simulator.hardware.library import list_hardware, load_hardware
from simulator.models.library import list_models, load_model
from simulator.prediction.prunings import Pruning
from simulator.prediction.tariff import NO_TARIFF
from simulator.pruning import FAMILIES, check_fraction
from simulator.pruning._family import SUFFIXES
from simulator.pruning._methods import METHODS, Method
from simulator.pruning._steps import PruningStep
from simulator.pruning.described.description import Description
from simulator.request import SETTINGS, Name, Request, Whole
from simulator.units import parse_fraction, parse_number, parse_quantity

# Comments, because Streamlit shows strings: values of one field, and predictions of a request;
# commands take more.
MOST_VALUES, MOST_PREDICTIONS = 25, 1000
MOST_LOADS = 8  # predictions at a rate: their figure takes some 2 s each
MOST_LETTERS = 4000  # letters of a setting in the address
FAMILY, TEXT, CHECKPOINT = "families", "text", "checkpoint"  # what states the pruning


class Field(NamedTuple):
    """A setting: its label, its default (a tuple: several values), its choices, and the parser of a
    text."""

    label: str
    default: str | tuple[str, ...]
    choices: Sequence[str] = ()
    read: Callable[[str], Any] = str
    help: str | None = None

    @property
    def several(self) -> bool:
        return isinstance(self.default, tuple)

    @property
    def shown(self) -> str | list[str]:
        """The default as the widget holds it."""
        return list(self.default) if self.several else str(self.default)


def values(text: str, read: Callable[[str], Any]) -> list[Any]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not 1 <= len(parts) <= MOST_VALUES:
        raise InputError(
            f"{one_line(text, 80)!r}: expected 1 to {MOST_VALUES} values separated by commas"
        )
    return [read(part) for part in parts]


def fractions(text: str) -> list[float]:
    return values(text, lambda part: check_fraction(parse_fraction(part)))


def prunings(text: str) -> list[str]:
    """Return the prunings of a text, one per line; plans and methods are files, which the page does
    not open."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MOST_VALUES:
        raise InputError(f"expected 1 to {MOST_VALUES} lines, got {len(lines)}")
    for line in lines:
        if any(word.endswith(SUFFIXES) for word in re.split(r"[\s+=%]+", line)):
            raise InputError(
                f"{line}: expected no plan or method file; use prunesim speedup --prune {line!r},"
                " or paste the method under families"
            )
        Pruning.read(line)
    return lines


def method(text: str, problems: Problems | None = None) -> Method | None:
    """Return the method that a text describes; its problems are added to ``problems``."""
    problems = Problems("line") if problems is None else problems
    return Method(Description.of_text(text, problems)) if text.strip() else None


def engine(text: str) -> str:
    """Return a shipped engine, with a version such as vllm@0.10; engine files are not opened."""
    if split(text)[0] not in list_engines():
        raise unknown("engine", text, list_engines())
    load_engine(text)
    return text


def optional(label: str, parse: Callable[[str], float], text: str) -> Field:
    """Return the field of a number that may be absent."""
    return Field(label, "", (), lambda given: parse(given) if given.strip() else None, text)


def of_setting(name: str) -> Field:
    """Return the field of a setting of the request; one of several values is a comma list."""
    setting = SETTINGS[name]
    accepts, optional = setting.accepts, setting.default is None

    def read(text: str) -> Any:
        if optional and not text.strip():
            return None
        if setting.several and isinstance(accepts, Whole):
            return values(text, lambda part: setting.check(setting.accepts.parse(part)))
        return setting.check(accepts.parse(text))

    choices = accepts.choices if isinstance(accepts, Name) else ()
    default = "" if optional else str(setting.default)
    return Field(
        setting.title,
        default,
        ("", *choices) if choices and optional else choices,
        read,
        setting.help,
    )


# Settings of the request with one value; the first is shown in two phases, others are under
# "Formats and devices".
SINGLE = ("new_tokens", "dtype", "weight_dtype", "kv_dtype", "devices", "parallel", "dense_s")

# Settings of requests that arrive: the options of prunesim serve, and its arguments.
ARRIVALS = {"rate": "rate", "ttft": "ttft_s", "tpot": "tpot_s"}
SECONDS = partial(parse_quantity, unit="s")

FIELDS: dict[str, Field] = {
    "model": Field("Model", "llama-3.1-8b", list_models()),
    "hardware": Field("Hardware", ("h100_sxm",), list_hardware()),
    "engine": Field(
        "Engine", (Request.engine,), list_engines(), engine, "Type vllm@0.10 for an older release."
    ),
    "by": Field("Pruning by", FAMILY, (FAMILY, TEXT, CHECKPOINT)),
    "family": Field(
        "Families and methods",
        ("depth", "width", "low_rank", "dynamic_depth"),
        (*FAMILIES, *METHODS),
    ),
    "method": Field(
        "Your method (YAML)",
        "",
        (),
        method,
        "The text of a method file, see prunesim methods new.",
    ),
    "sparsity": Field(
        "Removed",
        "25%",
        (),
        fractions,
        "Methods with sparsities of their own are predicted at these.",
    ),
    "prune": Field("Prunings, one per line", "width mlp=0.3 heads=0.2\ndepth 0.25", (), prunings),
    **{name: of_setting(name) for name in ("phase", "batch", "seq", *SINGLE)},
    "batch": of_setting("batch")._replace(default="1, 4, 16, 64"),
    "rate": optional("Requests per second", parse_number, "Simulates the schedule of a server."),
    "ttft": optional("Limit of the time to the first token", SECONDS, "Such as 300ms."),
    "tpot": optional("Limit of the time per further token", SECONDS, "Such as 30ms."),
    "energy": Field("Energy", "", ("", "shown")),
    "draft": Field("As a draft (decode)", "", ("", "shown")),
    "model_path": Field("Model: config.json or folder", ""),
    "pruned_path": Field("Pruned checkpoint: folder or config.json", ""),
    "profile_path": Field("Hardware profile: YAML file", ""),
    "detail": Field("Explain", ""),
}

OPENED: dict[str, Callable[[Path], Any]] = {
    "model_path": load_model,
    "pruned_path": load_model,
    "profile_path": load_hardware,
}


def main() -> None:
    st.set_page_config(page_title="prunesim", layout="wide")
    ignored = start()
    st.markdown("## How much faster will a pruned model be?")
    if ignored:
        # no markup, no links
        names = ", ".join(re.sub(r"[^\w-]", "?", name[:40]) for name in ignored[:5])
        st.warning(f"Settings of the address that were ignored: {names}")
    with st.sidebar:
        form()
    try:
        asked, texts = request()
        found = content(asked, st.session_state.detail)
    except InputError as error:
        st.error(markdown_text(str(error)))
    else:
        show(found, texts)
    keep()


def start() -> list[str]:
    """Fill the widgets from the address, once; return the settings that no widget can hold."""
    state, ignored = st.session_state, list[str]()
    if "opened" in state:
        for name in FIELDS:
            state[name] = state[name]  # Streamlit forgets the value of a widget that is not drawn
        return []
    state.opened, state.problem = {}, ""
    for name, field in FIELDS.items():
        state[name] = field.shown
    for name in st.query_params:
        try:
            state[name] = accepted(FIELDS[name], st.query_params.get_all(name))
        except (KeyError, InputError):
            ignored.append(name)
    return ignored


def accepted(field: Field, given: Sequence[str]) -> Any:
    """Return a setting of the address as its widget holds it; InputError for one that it cannot
    hold."""
    long = any(len(text) > MOST_LETTERS or "\0" in text for text in given)
    if long or (len(given) != 1 and not field.several):
        raise InputError("expected one short text")
    for text in given:
        if field.choices and field.read is not engine and text not in field.choices:
            raise InputError("expected one of the choices")
        field.read(text)
    return list(dict.fromkeys(given)) if field.several else given[0]


def keep() -> None:
    state = st.session_state
    changed = {n: state[n] for n, field in FIELDS.items() if state[n] != field.shown}
    st.query_params.from_dict(changed)


def draw(name: str) -> None:
    field = FIELDS[name]
    shared: dict[str, Any] = {"key": name, "help": field.help}
    if field.several:
        st.multiselect(
            field.label, field.choices, accept_new_options=field.read is engine, **shared
        )
    elif name == "by":
        st.radio(field.label, field.choices, horizontal=True, **shared)
    elif field.choices:
        st.selectbox(field.label, field.choices, **shared)
    elif name in ("prune", "method"):
        st.text_area(field.label, height=160, max_chars=MOST_LETTERS, **shared)
    else:
        st.text_input(field.label, max_chars=MOST_LETTERS, **shared)


def form() -> None:
    state = st.session_state
    for name in ("model", "hardware", "engine", "by"):
        draw(name)
    if state.by == FAMILY:
        draw("family")
        draw("method")
        problems = Problems("line")
        with contextlib.suppress(InputError):
            if own := method(state.method, problems):
                st.caption(f"The commands on this page read it from {own.name}.yaml.")
        if len(problems) > 1:
            st.error("  \n".join(map(markdown_text, problems.lines[:MOST_VALUES])))
        draw("sparsity")
    elif state.by == TEXT:
        draw("prune")
    draw("phase")
    left, right = st.columns(2)
    with left:
        draw("batch")
    with right:
        draw("seq")
    if SINGLE[0] in singles():
        draw(SINGLE[0])
    with st.expander(
        "Files", expanded=state.by == CHECKPOINT or any(state[name] for name in OPENED)
    ):
        for name in OPENED:
            draw(name)
        st.button(
            "Open", on_click=open_files, help="Reads the files of these paths on this machine."
        )
        if any(state[name].strip() and opened(name) is None for name in OPENED):
            st.caption("A file is read after a click on Open.")
        if state.problem:
            st.error(markdown_text(state.problem))
    with st.expander("Requests that arrive", expanded=any(state[name] for name in ARRIVALS)):
        for name in ARRIVALS:
            draw(name)
    draw("energy")
    if state.phase == "decode":
        draw("draft")
    with st.expander("Formats and devices"):
        for name in SINGLE[1:]:
            draw(name)


def singles() -> tuple[str, ...]:
    return SINGLE if st.session_state.phase in ("generate", "serve") else SINGLE[1:]


def open_files() -> None:
    state = st.session_state
    state.opened, state.problem = {}, ""
    try:
        for name, load in OPENED.items():
            if path := state[name].strip():
                state.opened[name] = path, load(Path(path).expanduser())
    except (InputError, OSError, RuntimeError, ValueError) as error:
        state.problem = one_line(str(error))


def opened(name: str) -> tuple[str, Any] | None:
    """Return the path and the content of a file, if the path in its field was opened."""
    found: tuple[str, Any] | None = st.session_state.opened.get(name)
    return found if found and found[0] == st.session_state[name].strip() else None


def parsed(name: str) -> Any:
    """Return the value of a text; errors begin with its label."""
    try:
        return FIELDS[name].read(st.session_state[name])
    except InputError as error:
        raise InputError(f"{FIELDS[name].label}: {error}") from None


def request() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings as arguments of :func:`simulator.table`, and as texts of the command
    line."""
    state = st.session_state
    model, profile = opened("model_path") or (state.model,) * 2, opened("profile_path")
    asked: dict[str, Any] = {
        "models": model[1],
        "hardware": [*state.hardware, *(profile or ())[1:]],
        "phase": [state.phase],
        "engine": [engine(text) for text in state.engine],
    }
    texts: dict[str, Any] = {
        "model": model[0],
        "hardware": ",".join([*state.hardware, *(profile or ())[:1]]),
        "phase": state.phase,
        "engine": ",".join(state.engine),
    }
    for these, own in zip((asked, texts), pruned()):
        these.update(own)
    for name in ("batch", "seq"):
        asked[name], texts[name] = parsed(name), ",".join(values(state[name], str))
    for name in singles():
        asked[name], setting = parsed(name), SETTINGS[name]
        if asked[name] != setting.default:
            texts[setting.flags[0][2:]] = state[name].strip()
    arrivals = {ARRIVALS[name]: parsed(name) for name in ARRIVALS if state[name].strip()}
    if arrivals and state.batch == FIELDS["batch"].default:
        asked["batch"], texts["batch"] = [1], "1"  # the rate states how many are in flight
    asked |= arrivals
    texts |= {name: state[name].strip() for name in ARRIVALS}
    if state.energy:
        asked["tariff"], texts["energy"] = NO_TARIFF, True
    if state.draft and state.phase == "decode":
        asked["draft"] = True
    many = math.prod(len(value) or 1 for value in asked.values() if isinstance(value, list))
    most, other = (MOST_LOADS, "serve") if arrivals else (MOST_PREDICTIONS, "sweep")
    if many > most:
        raise InputError(
            f"request: expected at most {most:,} predictions, got {many:,}; see prunesim {other}"
        )
    return asked, texts


def pruned() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the prunings as arguments and as texts, as :func:`request`."""
    state = st.session_state
    if state.by == TEXT:
        return ({"prune": parsed("prune")},) * 2
    if state.by == CHECKPOINT:
        if (found := opened("pruned_path")) is None:
            raise InputError(
                "checkpoint: expected the path of a pruned checkpoint in Files, and a click on Open"
            )
        return {"pruned": [found[1]]}, {"pruned": found[0]}
    own, shares = parsed("method"), parsed("sparsity")
    if not state.family and own is None:
        raise InputError("family: expected at least one")
    if own is None and all(name in FAMILIES for name in state.family):
        sparsity = ",".join(values(state.sparsity, str))
        texts = {"family": ",".join(state.family), "sparsity": sparsity}
        return {"family": state.family, "sparsity": shares}, texts
    prunings = with_methods(state.family, own, shares)
    return {"prune": prunings}, {"prune": [pruning.prune for pruning in prunings]}


def with_methods(
    names: Sequence[str], own: Method | None, shares: Sequence[float]
) -> list[Pruning]:
    """Return families at the shares removed, and methods at their own sparsities if they state
    some."""
    found = [Pruning.of(name) for name in names]
    found += [Pruning((PruningStep(f"{own.name}.yaml", described=own),))] if own else []
    out = list[Pruning]()
    for pruning in found:
        stated = () if (known := pruning.steps[0].method) is None else known.sparsities
        out += [pruning] if pruning.sets_sparsity else [pruning.at(s) for s in stated or shares]
    return out


def show(found: PageContent | LoadContent, texts: dict[str, Any]) -> None:
    write(found.answer, "font-size: 1.15rem; font-weight: 600")
    if isinstance(found, PageContent):
        st.session_state.explained = found.detail.pruning
        st.selectbox("Explain", found.prunings, key="explained", on_change=choose)
    figures = st.empty()
    write([*found.losses, *found.parts])
    table = found.table
    number = st.column_config.NumberColumn(format="%.2f")
    formats = {name: number for name, column in table.items() if isinstance(column[0], float)}
    st.dataframe(table, column_config=formats, hide_index=True)
    st.download_button(
        "All columns as CSV", csv_text(found.records), "prunesim.csv", "text/csv", on_click="ignore"
    )
    if found.notes:
        with st.expander(f"Notes ({len(found.notes)})", expanded=len(found.notes) <= 3):
            write(found.notes)
    options = {name: text for name, text in texts.items() if name != "model"}
    st.code("\n".join(commands(texts["model"], options, found)), language="bash", wrap_lines=True)
    # last, so that the answer and the table do not wait for them
    drawn = "".join(map(figure, found.drawings))
    figures.html(f'<div style="display: flex; flex-wrap: wrap; gap: 16px">{drawn}</div>')


def write(lines: Sequence[str], style: str = "") -> None:
    """Write paragraphs in which nothing is markup."""
    st.html(
        "".join(f'<p style="overflow-wrap: anywhere; {style}">{escape(line)}</p>' for line in lines)
    )


def choose() -> None:
    """Explain the chosen pruning from now on, instead of the least efficient."""
    st.session_state.detail = st.session_state.explained


def figure(drawing: Drawing) -> str:
    data = base64.b64encode(drawing.svg.encode()).decode()
    basis, most = ("100%", "none") if drawing.width > 400 else ("290px", "515px")
    size = f"width: 100%; min-width: {drawing.width - 20}px; max-width: {most}"
    title = escape(drawing.title)
    return (
        f'<figure style="margin: 0; flex: 1 1 {basis}; min-width: 0; max-width: 100%">'
        f'<figcaption style="font-weight: 600">{title}</figcaption>'
        '<div style="overflow-x: auto; background: #fff">'
        f'<img alt="{title}" src="data:image/svg+xml;base64,{data}" style="{size}"></div></figure>'
    )


if __name__ == "__main__":
    main()
