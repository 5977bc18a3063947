"""Build the command lines that print the page's numbers.

Use :func:`commands`. A command is a list of arguments: a test can run it, and quoting makes it a shell line.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulator.engines.engine import DEFAULT_ENGINE
from simulator.explore.address import to_query
from simulator.explore.dropped import PREFIX, path_of
from simulator.explore.predictions import Predictions, predictions
from simulator.explore.state import EXISTING, State, typed
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.prediction.scenario import batch_name

DETAIL = "waterfall and roofline"
"""Name of the numbers of the pruning in detail."""


@dataclass(frozen=True)
class Command:
    """One command line and the name of the numbers that it prints."""

    gives: str
    arguments: tuple[str, ...]

    @property
    def line(self) -> str:
        """The command as a shell line."""
        return shlex.join(("prunesim", *self.arguments))


def commands(state: State, found: Predictions) -> tuple[Command, ...]:
    """Return the commands that print the page's numbers; none if there is no table.

    >>> from simulator.explore.predictions import predictions
    >>> state = State(families=("depth",), sparsities=(0.25,), detail="depth", at=0.25)
    >>> commands(state, predictions(state))[1].line[:73]
    'prunesim speedup llama-3.1-8b --hardware h100_sxm --family depth --sparsi'
    """
    if found.problem:
        return ()
    supported = _gpus(state, {gpu.label for gpu in found.gpus})
    known = _times({"--dense-time": state.dense_ms})
    used = known if state.scenario.dense_s is not None else ()
    pruned = ("--pruned", _typed(state.pruned)) if state.pruned else ()
    others = {"prunings": _prune(state.texts)} if found.prunings else {}
    others |= {"pruned model": pruned} if found.existing else {}
    out = {"curves and table": _line("speedup", state, supported, _families(state.drawn, state.fractions)) + used}
    out |= {name: _line("speedup", state, supported, which) + used for name, which in others.items()}
    for name, which in {"families": _families(state.drawn, [state.at]), **others}.items():
        out[f"{name} over {_axis(state)}"] = _over(state, supported, which, state.over)
    detail = pruned if state.explained == EXISTING else _prune([state.explained])
    if state.explained in state.drawn:
        detail = _families([state.explained], [state.at])
    if state.phase == "serve":
        out["throughput"] = _serve(state, supported, detail)
    elif state.phase != "prefill" and state.over != "batch":
        out["throughput"] = _over(state, supported, detail, "batch")
    if found.details:
        gpus = _gpus(state, {e.result.hardware for e in found.details})
        out[DETAIL] = _line("explain", state, gpus, detail) + used
    if found.versus:
        other = replace(state, engine=state.versus)
        gpus = _gpus(state, {e.result.hardware for e in found.versus})
        out[f"waterfall in {found.versus[0].result.engine}"] = _line("explain", other, gpus, detail)
    if state.pin is not None:
        pinned = commands(state.pin, predictions(state.pin))
        out.update(("A, pinned", c.arguments) for c in pinned if c.gives == DETAIL)
    out["map"] = _line("speedup", state, supported, _families(state.drawn, [state.at]), BATCHES, LENGTHS)
    out["this page as a file"] = (*_report(state, (*pruned, *known)), "-o", "report.html")
    return tuple(Command(gives, line) for gives, line in out.items())


def _axis(state: State) -> str:
    return "sequence" if state.over == "seq" else batch_name(state.phase)


def _values(values: Sequence[int]) -> str:
    """Return whole numbers as the command line takes them; several are powers of two."""
    return str(values[0]) if len(values) == 1 else f"{values[0]}:{values[-1]}"


def _over(state: State, gpus: Sequence[str], which: tuple[str, ...], axis: str) -> tuple[str, ...]:
    """Return the command that prints the speedups of some prunings over batch or sequence."""
    batches, lengths = (list(dict.fromkeys(values)) for values in zip(*state.shapes(axis)))
    return _line("speedup", state, gpus, which, batches, lengths)


def _serve(state: State, gpus: Sequence[str], which: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command that prints the services of a serve."""
    return _line("serve", state, gpus, which) + _limits(state)


def _limits(state: State) -> tuple[str, ...]:
    price = () if state.price is None else ("--price", typed(state.price))
    return (*_times({"--ttft": state.ttft_ms, "--tpot": state.tpot_ms}), *price)


def _times(given: Mapping[str, float | None]) -> tuple[str, ...]:
    """Return the options of times that are given, in ms."""
    return tuple(part for option, ms in given.items() if ms is not None for part in (option, f"{typed(ms)}ms"))


def _report(state: State, more: tuple[str, ...]) -> tuple[str, ...]:
    """Return the command that writes the page; a page with a pin is given by its address."""
    if state.pin is not None:
        return ("report", f"?{to_query(state)}")
    which = (*_families(state.families, state.sparsities), *_prune(state.prune))
    line = _line("report", state, [_typed(gpu) for gpu in state.gpus], which) + more + _limits(state)
    line += ("--versus", state.versus) if state.versus else ()
    line += ("--over", state.over) if state.over != "batch" else ()
    return (*line, "--detail", state.detail, "--at", repr(state.at))


def _families(names: Sequence[str], sparsities: Sequence[float]) -> tuple[str, ...]:
    return ("--family", ",".join(names), "--sparsity", ",".join(map(str, sparsities)))


def _prune(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for text in texts for part in ("--prune", text))


def _gpus(state: State, labels: Collection[str]) -> list[str]:
    """Return the GPUs of a state with one of the labels, as the command line takes them."""
    return [_typed(gpu) for gpu, profile in zip(state.gpus, state.profiles) if profile.label in labels]


def _typed(value: str) -> str:
    """Return a model or device as the command line takes it; a dropped file is expected in the current folder."""
    return path_of(value) if value.startswith(PREFIX) else value


def _line(
    command: str,
    state: State,
    gpus: Sequence[str],
    which: tuple[str, ...],
    batches: Sequence[int] = (),
    lengths: Sequence[int] = (),
) -> tuple[str, ...]:
    """Return the arguments of a command; defaults of the command are omitted."""
    values: dict[str, Any] = {"--concurrency": state.batch}
    if command != "serve":
        values = {"--phase": state.phase, "--batch": _values(batches or [state.batch])}
    values["--seq"] = _values(lengths or [state.seq])
    if state.phase in ("generate", "serve"):
        values["--new-tokens"] = state.new_tokens
    if state.engine != DEFAULT_ENGINE:
        values["--engine"] = state.engine
    if state.arithmetic != "bf16":
        values["--dtype"] = state.arithmetic
    if state.weights:
        values["--weight-dtype"] = state.weights
    if state.devices > 1:
        values["--devices"] = state.devices
    request = (part for option, value in values.items() for part in (option, str(value)))
    return (command, _typed(state.model), "--hardware", ",".join(gpus), *which, *request)
