"""The command lines that give the same numbers as the page.

Use :func:`commands`; each is a list of arguments, so that a test can run it and a shell line is made by quoting.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from simulator.engines.engine import DEFAULT_ENGINE
from simulator.explore.answer import Answer
from simulator.explore.dropped import PREFIX, read_token
from simulator.explore.state import State
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.hardware.library import load_hardware

if TYPE_CHECKING:
    from simulator.predict.table import Explanation


@dataclass(frozen=True)
class Command:
    """One command line and what it prints."""

    gives: str
    arguments: tuple[str, ...]

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(("prunesim", *self.arguments))


def commands(state: State, answer: Answer) -> tuple[Command, ...]:
    """What to type for the numbers of the page; nothing where there are none.

    >>> from simulator.explore.answer import answer
    >>> state = State(families=("depth",), sparsities=(0.25,), detail="depth", at=0.25)
    >>> commands(state, answer(state))[1].line[:73]
    'prunesim explain llama-3.1-8b --hardware h100_sxm --family depth --sparsi'
    """
    if answer.refused:
        return ()
    every = _line("speedup", state, answer.gpus, state.drawn, state.fractions)
    known = ("--dense-time", f"{state.dense_text}ms") if state.dense_ms is not None else ()
    used = known if state.setting.dense_s is not None else ()
    out = {"curves and table": every + used}
    if answer.details:
        detail = _line("explain", state, _gpus(answer, answer.details), state.detail, state.at)
        out["waterfall and roofline"] = detail + used
    if answer.versus:
        beside = replace(state, engine=state.versus)
        gpus = _gpus(answer, answer.versus)
        out[f"waterfall in {answer.versus[0].record.engine}"] = _line("explain", beside, gpus, state.detail, state.at)
    out["map"] = _line("speedup", state, answer.gpus, state.drawn, state.at, BATCHES, LENGTHS)
    report = _line("report", state, state.gpus, state.families, state.sparsities) + known
    report += ("--versus", state.versus) if state.versus else ()
    out["this page as a file"] = (*report, "--detail", state.detail, "--at", repr(state.at), "-o", "report.html")
    return tuple(Command(gives, line) for gives, line in out.items())


def _gpus(answer: Answer, explained: Sequence[Explanation]) -> list[str]:
    """GPUs of some explanations as the state names them."""
    labels = {e.record.hardware for e in explained}
    return [gpu for gpu in answer.gpus if load_hardware(gpu).label in labels]


def _line(
    command: str, state: State, gpus: Any, family: Any, sparsity: Any, batch: Any = None, seq: Any = None
) -> tuple[str, ...]:
    """Arguments of a command; what is the command's own default is left out."""
    values = {"--hardware": gpus, "--family": family, "--sparsity": sparsity, "--phase": state.phase}
    values |= {"--batch": batch or state.batch, "--seq": seq or state.seq}
    if state.phase in ("generate", "serve"):
        values["--new-tokens"] = state.new_tokens
    if state.engine != DEFAULT_ENGINE:
        values["--engine"] = state.engine
    if state.dtype != "bf16":
        values["--dtype"] = state.dtype
    texts = {option: ",".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for option, v in values.items()}
    dropped = state.model.startswith(PREFIX)  # a dropped file is where the command is run
    model = f"./{read_token(state.model)[0]}" if dropped else state.model
    return (command, model, *(part for pair in texts.items() for part in pair))
