"""Build the command lines that print the page's numbers.

Use :func:`commands`. A command is a list of arguments: a test can run it, and quoting makes it a shell line.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from simulator.engines.engine import DEFAULT_ENGINE
from simulator.explore.dropped import PREFIX, path_of
from simulator.explore.predictions import Predictions
from simulator.explore.state import EXISTING, State
from simulator.figures.paper import BATCHES, LENGTHS


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
    'prunesim explain llama-3.1-8b --hardware h100_sxm --family depth --sparsi'
    """
    if found.problem:
        return ()
    supported = _gpus(state, {gpu.label for gpu in found.gpus})
    every = _line("speedup", state, supported, state.drawn, state.fractions)
    known = ("--dense-time", f"{state.dense_text}ms") if state.dense_ms is not None else ()
    used = known if state.scenario.dense_s is not None else ()
    out = {"curves and table": every + used}
    pruned = ("--pruned", _typed(state.pruned)) if state.pruned else ()
    if found.existing:
        out["pruned model"] = _line("speedup", state, supported) + pruned + used
    selected, more = ((), pruned) if state.explained == EXISTING else ((state.explained, state.at), ())
    if found.details:
        gpus = _gpus(state, {e.result.hardware for e in found.details})
        out["waterfall and roofline"] = _line("explain", state, gpus, *selected) + more + used
    if found.versus:
        other = replace(state, engine=state.versus)
        gpus = _gpus(state, {e.result.hardware for e in found.versus})
        out[f"waterfall in {found.versus[0].result.engine}"] = _line("explain", other, gpus, *selected) + more
    out["map"] = _line("speedup", state, supported, state.drawn, state.at, BATCHES, LENGTHS)
    every_gpu = [_typed(gpu) for gpu in state.gpus]
    report = _line("report", state, every_gpu, state.families, state.sparsities) + pruned + known
    report += ("--versus", state.versus) if state.versus else ()
    out["this page as a file"] = (*report, "--detail", state.detail, "--at", repr(state.at), "-o", "report.html")
    return tuple(Command(gives, line) for gives, line in out.items())


def _gpus(state: State, labels: Collection[str]) -> list[str]:
    """Return the GPUs of a state with one of the labels, as the command line takes them."""
    return [_typed(gpu) for gpu, profile in zip(state.gpus, state.profiles) if profile.label in labels]


def _typed(value: str) -> str:
    """Return a model or device as the command line takes it; a dropped file is expected in the current folder."""
    return path_of(value) if value.startswith(PREFIX) else value


def _line(
    command: str, state: State, gpus: Any, family: Any = None, sparsity: Any = None, batch: Any = None, seq: Any = None
) -> tuple[str, ...]:
    """Return the arguments of a command; defaults of the command are omitted."""
    values: dict[str, Any] = {"--hardware": gpus}
    values |= {"--family": family, "--sparsity": sparsity} if family is not None else {}
    values["--phase"] = state.phase
    values |= {"--batch": batch or state.batch, "--seq": seq or state.seq}
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
    texts = {option: ",".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for option, v in values.items()}
    return (command, _typed(state.model), *(part for pair in texts.items() for part in pair))
