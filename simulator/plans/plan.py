"""Write a plan: ``plan.yaml`` for ``--prune``, ``config.json`` with ``block_configs``, and ModelOpt's solutions.

Use :func:`write_plan` for all files, :func:`plan_text` for the YAML.
"""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from simulator.errors import InputError
from simulator.files.write import write_whole
from simulator.models.block import Block
from simulator.models.changes import config_of, content_of, write_config
from simulator.models.config import ModelConfig
from simulator.models.difference import runs
from simulator.models.lower import lower
from simulator.plans.subblock_stats import solutions_of
from simulator.plans.variants import has
from simulator.pruning._grammar import plan_steps
from simulator.pruning._steps import prune_steps

if TYPE_CHECKING:
    from simulator.plans.search import Plan

PLAN, SOLUTIONS = "plan.yaml", "solutions.json"


def plan_text(dense: ModelConfig, pruned: ModelConfig) -> str:
    """Return a plan as YAML that ``--prune`` reads.

    Raises
    ------
    InputError
        If a layer has a linear sublayer, which no family of pruning has.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> from simulator.plans.prices import planned
    >>> from simulator.plans.variants import variant
    >>> model = load_model("llama-3.1-8b")
    >>> blocks = [*model.layout[:31], variant("mlp", "7168", model.usual)]
    >>> print(plan_text(model, planned(model, blocks)))
    layers:
      31: width mlp=0.5 align=1
    <BLANKLINE>
    """
    texts = [_text(old, new) for old, new in zip(dense.layout, pruned.layout)]
    lines = ["layers:"]
    for text, some in groupby(range(len(texts)), key=lambda i: texts[i]):
        if text:
            lines.append(f"  {runs(some)}: {text}")
    if len(lines) == 1:
        return "prune: depth 0\n"
    return "\n".join(lines) + "\n"


def _text(old: Block, new: Block) -> str:
    """Return the pruning of one layer as a text of the grammar."""
    if new.linear != old.linear:
        raise InputError("plan: --prune has no linear sublayers; use the written config.json")
    gone = [name for name in ("attention", "mlp") if has(name, old) and not has(name, new)]
    if len(gone) == 2 or (gone and not any(has(name, new) for name in ("attention", "mlp"))):
        return "depth"
    steps = [f"depth unit={name}" for name in gone]
    parts = []
    if "attention" not in gone and (new.heads, new.kv_heads) != (old.heads, old.kv_heads):
        for name, now, was in (("heads", new.heads, old.heads), ("kv", new.kv_heads, old.kv_heads)):
            parts += [f"{name}={_removed(now, was)}"] if now != was else []
    if "mlp" not in gone:
        width, dense = (new.expert_inner, old.expert_inner) if old.experts else (new.inner, old.inner)
        parts += [f"mlp={_removed(width, dense)}"] if width != dense else []
        if new.experts != old.experts:
            steps.append(f"experts {_removed(new.experts, old.experts)}")
    if parts:
        steps.insert(0, f"width {' '.join(parts)} align=1")
    return " + ".join(steps)


def _removed(now: int, was: int) -> str:
    """Return the removed fraction, rounded up, as families round the width that stays up."""
    return f"{math.ceil((1.0 - now / was) * 1e9 - 1e-3) / 1e9:.9g}"


def write_plan(plan: Plan, source: str, folder: str) -> list[str]:
    """Write a plan to a folder, which is created; return a line per file, or why one is missing.

    ``source`` is the dense model as it was given: its ``config.json`` is the start of that of the plan. InputError if
    the folder has the ``config.json`` of another plan; nothing is written then.
    """
    target = Path(folder).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be used ({error.strerror or error}); expected a folder") from None
    dense, lines = plan.dense, list[str]()
    content, text = None, None
    try:
        content = config_of(content_of(source, dense), dense, plan.pruned)
    except InputError as error:
        lines.append(f"config.json is not written: {error}")
    try:
        text = plan_text(dense, plan.pruned)
        check_plan(text, dense, plan.pruned)
    except InputError as error:
        text = None
        lines.append(f"{PLAN} is not written: {error}")
    if content is not None:
        write_config(target, content)  # first: it never replaces that of another plan
    if text is not None:
        write_whole(target / PLAN, text.encode())
    else:
        (target / PLAN).unlink(missing_ok=True)  # a plan of other shapes must not stay
    solutions = json.dumps(solutions_of(plan), indent=1, allow_nan=False) + "\n"
    write_whole(target / SOLUTIONS, solutions.encode())
    written = [*([PLAN] if text else []), *(["config.json"] if content else []), SOLUTIONS]
    if text is not None:
        r = plan.results[0]  # other commands have other defaults
        lines.append(
            f"with --prune {folder}/{PLAN} use the same request: --phase {r.phase} --batch {r.batch} --seq {r.seq}"
        )
    return [f"written: {folder}/{{{','.join(written)}}}", *lines]


def check_plan(text: str, dense: ModelConfig, pruned: ModelConfig) -> None:
    """Raise InputError if the text of a plan does not give the parameters and FLOPs of the plan."""
    own = prune_steps(lower(dense, phase="decode"), plan_steps(text))
    other = lower(pruned, phase="decode")
    pairs = [(w.parameters, float(w.flops.sum())) for w in (own, other)]
    if abs(pairs[0][0] - pairs[1][0]) > 0.5 or abs(pairs[0][1] / pairs[1][1] - 1.0) > 1e-9:
        raise InputError("the families of --prune cannot state these shapes exactly")
