"""What was pruned: the families that were applied to a workload, or what tells a pruned model from its dense one."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import lru_cache

from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.models.difference import difference
from simulator.models.lower import lower
from simulator.pruning import FAMILIES
from simulator.workload import Applied, Meta, Workload

SETTING: tuple[str, ...] = ("engine", "phase", "batch", "seq", "new_tokens", "dtype", "devices", "parallel")
"""What a pruned and a dense workload must have in common to be compared."""


def one_setting(dense: Workload, pruned: Workload) -> None:
    """InputError, one line, where two workloads are not of one setting.

    >>> import simulator
    >>> model = simulator.load_model("llama-3.2-1b")
    >>> one_setting(*(simulator.lower(model, phase=phase) for phase in ("prefill", "decode")))
    Traceback (most recent call last):
    simulator.errors.InputError: phase: the pruned model has 'decode', the dense 'prefill'; expected one setting
    """
    for name in SETTING:
        theirs, ours = getattr(pruned.meta, name), getattr(dense.meta, name)
        if theirs != ours:
            raise InputError(f"{name}: the pruned model has {theirs!r}, the dense {ours!r}; expected one setting")


@lru_cache(maxsize=64)
def told_apart(dense: ModelConfig, pruned: ModelConfig) -> tuple[tuple[str, ...], float]:
    """Families that tell a pruned model from its dense one, and the share of parameters that are gone or zero."""
    words = (re.match("[a-z_]+", line) for line in difference(dense, pruned))
    names = dict.fromkeys(word[0] for word in words if word and word[0] in FAMILIES)
    left = (lower(model, phase="decode", seq=1, engine="").parameters for model in (pruned, dense))
    return tuple(names), 1.0 - next(left) / next(left)


def another_model(dense: Workload, pruned: Workload) -> bool:
    """Whether a pruned workload was lowered from a model of its own."""
    ours, theirs = dense.meta.config, pruned.meta.config
    return ours is not None and theirs is not None and ours is not theirs and ours != theirs


def applied(dense: Meta, pruned: Meta) -> tuple[str, float, float]:
    """Families that pruned a workload, joined by "+", and the fractions they removed together: asked for, and after
    rounding; of another model, the families that tell it from the dense one and the share of parameters removed."""
    steps = pruned.applied[len(dense.applied) :]
    asked = float(1.0 - math.prod(1.0 - step.sparsity for step in steps))
    realised = float(1.0 - math.prod(1.0 - step.realised for step in steps))
    return "+".join(step.family for step in steps) or "none", asked, realised


def as_pruned(dense: Workload, pruned: Workload) -> Workload:
    """A workload of a pruned model that exists, with what tells it from its dense one as if that had been applied."""
    one_setting(dense, pruned)
    own, other = pruned.meta.applied[len(dense.meta.applied) :], another_model(dense, pruned)
    families, share = told_apart(dense.meta.config, pruned.meta.config) if other else ((), 0.0)
    step = Applied("+".join(families) or "none", share, share)
    if own[:1] == (step,) or (own and not other):  # known already
        return pruned
    return pruned.replace(meta=replace(pruned.meta, applied=(*dense.meta.applied, step, *own)))
