"""The command lines that give the same numbers as the page.

Use :func:`commands`; each is a list of arguments, so that a test can run it and a shell line is made by quoting.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from simulator.explore.answer import Answer
from simulator.explore.dropped import PREFIX, read_token
from simulator.explore.state import State
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.hardware.library import load_hardware


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

    Examples
    --------
    >>> from simulator.explore.answer import answer
    >>> state = State(families=("depth",), sparsities=(0.25,), detail="depth", at=0.25)
    >>> commands(state, answer(state))[1].line
    'prunesim explain llama-3.1-8b --hardware h100_sxm --family depth --sparsity 0.25 --phase prefill --batch 1 --seq 2048'
    """
    if answer.refused:
        return ()
    drawn, at = ",".join(state.drawn), f"{state.at!r}"
    every = ",".join(repr(s) for s in state.fractions)
    explained = [e.record.hardware for e in answer.details]
    gpus = [gpu for gpu in answer.gpus if load_hardware(gpu).name in explained]
    out = [
        Command("curves and table", _line("speedup", state, answer.gpus, drawn, every)),
        Command("waterfall and roofline", _line("explain", state, gpus, state.detail, at)),
        Command(
            "map",
            _line("speedup", state, answer.gpus, drawn, at, ",".join(map(str, BATCHES)), ",".join(map(str, LENGTHS))),
        ),
        Command(
            "this page as a file",
            (
                *_line(
                    "report", state, state.gpus, ",".join(state.families), ",".join(repr(s) for s in state.sparsities)
                ),
                "--detail",
                state.detail,
                "--at",
                at,
                "-o",
                "report.html",
            ),
        ),
    ]
    return tuple(out if answer.details else [c for c in out if c.arguments[0] != "explain"])


def _line(
    command: str, state: State, gpus: Sequence[str], family: str, sparsity: str, batch: str = "", seq: str = ""
) -> tuple[str, ...]:
    """Arguments of a command; what is the command's own default is left out."""
    out = [
        command,
        model_argument(state),
        "--hardware",
        ",".join(gpus),
        "--family",
        family,
        "--sparsity",
        sparsity,
        "--phase",
        state.phase,
    ]
    out += ["--batch", batch or str(state.batch), "--seq", seq or str(state.seq)]
    if state.phase == "generate":
        out += ["--new-tokens", str(state.new_tokens)]
    if state.runtime != "cuda_graph":
        out += ["--runtime", state.runtime]
    if state.dtype != "bf16":
        out += ["--dtype", state.dtype]
    return tuple(out)


def model_argument(state: State) -> str:
    """The model as a command takes it; a dropped file is where the command is run.

    >>> model_argument(State())
    'llama-3.1-8b'
    """
    return f"./{read_token(state.model)[0]}" if state.model.startswith(PREFIX) else state.model
