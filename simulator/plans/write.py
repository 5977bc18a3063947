"""Write plans: ``plan.yaml`` for ``--prune``, and ``config.json`` with ``block_configs``."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from simulator.display import runs
from simulator.errors import InputError
from simulator.files.write import refuse_links, write_whole
from simulator.models.lower import lower
from simulator.models.model import PARTS, Layer, Model, pruned_from
from simulator.models.sublayers import Attention, Experts, LatentAttention, Linear, Mlp
from simulator.models.sublayers.base import Sublayer
from simulator.models.write import config_content, content_of, write_config
from simulator.pruning._steps import plan_steps, prune_steps

if TYPE_CHECKING:
    from simulator.plans.search import Plan

PLAN = "plan.yaml"


def plan_text(dense: Model, pruned: Model) -> str:
    """Return a plan as YAML that ``--prune`` reads; InputError for a linear sublayer, which no
    family has."""
    texts = [_text(old, new) for old, new in zip(dense.layers, pruned.layers)]
    lines = ["layers:"]
    for text, some in groupby(range(len(texts)), key=lambda i: texts[i]):
        if text:
            lines.append(f"  {runs(some)}: {text}")
    if len(lines) == 1:
        return "prune: depth 0\n"
    return "\n".join(lines) + "\n"


def _text(old: Layer, new: Layer) -> str:
    pairs = {part: (old.of(part), new.of(part)) for part in PARTS}
    if any(isinstance(after, Linear) and after != before for before, after in pairs.values()):
        raise InputError("plan: --prune has no linear sublayers; use the written config.json")
    gone = [part for part, (before, after) in pairs.items() if before and not after]
    if len(gone) == 2 or (gone and not new.sublayers):
        return "depth"
    steps = [f"depth unit={part}" for part in gone]
    widths, experts = _heads(pairs["attention"]), ""
    before, after = pairs["mlp"]
    if isinstance(before, Experts) and isinstance(after, Experts):
        experts = _removed(after.experts, before.experts)
    if isinstance(before, Mlp | Experts) and isinstance(after, Mlp | Experts):
        widths += [f"mlp={share}"] if (share := _removed(after.inner, before.inner)) else []
    if widths:
        steps.insert(0, f"width {' '.join(widths)} align=1")
    return " + ".join(steps + ([f"experts {experts}"] if experts else []))


def _heads(pair: tuple[Sublayer | None, Sublayer | None]) -> list[str]:
    before, after = pair
    known = Attention | LatentAttention
    if not (isinstance(before, known) and isinstance(after, known)):
        return []
    shares = {"heads": _removed(after.heads, before.heads)}
    if isinstance(after, Attention):
        shares["kv"] = _removed(after.kv_heads, before.kv_heads)
    return [f"{name}={share}" for name, share in shares.items() if share]


def _removed(now: int, was: int) -> str:
    """Return the removed fraction, rounded up, as families round the width that stays up; "" for
    none."""
    if now == was:
        return ""
    return f"{math.ceil((1.0 - now / was) * 1e9 - 1e-3) / 1e9:.9g}"


def write_plan(plan: Plan, source: str, folder: str) -> list[str]:
    """Write a plan to a folder, which is created; return a line per file, or why one is missing.
    ``source`` is the dense model as it was given: its ``config.json`` is the start of that of the
    plan. InputError if the folder has the ``config.json`` of another plan; nothing is written
    then."""
    target = Path(folder).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be used ({error.strerror or error}); expected a folder"
        ) from None
    refuse_links(target, PLAN)
    dense, lines = plan.dense, list[str]()
    content, text = None, None
    try:
        content = config_content(content_of(source, dense), dense, plan.pruned)
    except InputError as error:
        lines.append(f"config.json is not written: {error}")
    try:
        text = plan_text(dense, plan.pruned)
        check_plan(text, dense, plan.pruned)
    except InputError as error:
        text = None
        lines.append(f"{PLAN} is not written: {error}")
    if content is not None:
        # written first: it never replaces the config.json of another plan
        write_config(target, content)
    if text is not None:
        write_whole(target / PLAN, text.encode())
        r = plan.results[0]  # the request is stated, because other commands have other defaults
        request = f"--phase {r.phase} --batch {r.batch} --seq {r.seq}"
        lines.append(f"with --prune {folder}/{PLAN} use the same request: {request}")
    else:
        (target / PLAN).unlink(missing_ok=True)  # removes an older plan of other shapes
    written = [*([PLAN] if text else []), *(["config.json"] if content else [])]
    return [
        f"written: {folder}/{{{','.join(written)}}}"
        if written
        else f"{folder}: no file is written",
        *lines,
    ]


def check_plan(text: str, dense: Model, pruned: Model) -> None:
    """Raise InputError if the text of a plan does not give the parameters and FLOPs of the plan."""
    own = prune_steps(lower(dense, phase="decode"), plan_steps(text))
    other = lower(pruned_from(dense, pruned), phase="decode")
    pairs = [(w.parameters, float(w.flops.sum())) for w in (own, other)]
    if abs(pairs[0][0] - pairs[1][0]) > 0.5 or abs(pairs[0][1] / pairs[1][1] - 1.0) > 1e-9:
        raise InputError("the families of --prune cannot state these shapes exactly")
