"""Expert pruning: remove or merge routed experts (REAP, MoE-Pruner, HC-SMoE), or use fewer per token."""

from __future__ import annotations

import numpy as np

from simulator.arrays import Array
from simulator.errors import InputError
from simulator.pruning._edits import resized, whole_share
from simulator.pruning._family import Choice, Family, Pruned, one_of
from simulator.pruning._rows import covering, removed
from simulator.workload import Kind, Workload


def experts(w: Workload, choice: Choice, *, ideal: bool, fewer: str = "experts") -> Pruned:
    """Keep ``round((1-s) E)`` routed experts per layer, at least as many as a token uses; the router shrinks.

    A merged expert costs as much as a kept expert. Each remaining expert sees more tokens: the FLOPs are the same, with
    fewer weights to read. With ``fewer`` "active" all experts stay, and a token uses ``round((1-s) A)`` of them, at
    least one. With expert parallel, these are numbers over all devices. A model without routed experts does not change.
    """
    one_of("fewer", fewer, ("experts", "active"))
    routed = w.kind == Kind.EXPERTS
    devices = w.meta.devices if w.meta.parallel == "expert" else 1
    own: Array = w.experts if fewer == "experts" else w.active
    least = np.ceil(w.active * devices) if fewer == "experts" else np.ones(len(w))
    before = own * devices
    kept = np.where(routed & (choice.rows > 0), np.maximum(whole_share(1.0 - choice.rows, before), least), before)
    realised = removed(*(float(values @ (w.count * routed)) for values in (before, kept)))
    if fewer == "active":
        return w.replace(active=kept / devices), realised
    if (uneven := routed & (kept % devices > 0)).any():
        expected = f"expected a multiple of {devices} devices"
        raise InputError(f"experts at sparsity {choice.asked:g}: {expected}, got {kept[uneven][0]:g} experts")
    routes = w.is_role("router") & ~w.overhead & (covering(w, routed, w.experts) > 0)
    out = resized(w, np.where(routes, covering(w, routed, kept), w.n).astype(np.int64), w.k)
    params = np.where(routed, w.params * (kept / np.maximum(before, 1)), out.params)
    return out.replace(experts=np.where(routed, kept / devices, w.experts), params=params), realised


FAMILY = Family(
    function=experts,
    axis="static or dynamic N of experts",
    order=12,
    needs="experts",
    summary="removes or merges routed experts, or activates fewer per token (fewer=active)",
    cost="nothing; each remaining expert sees more tokens",
    realised="routed experts (active ones) removed / routed experts (active ones)",
)
