"""Planted times of selective scans are fitted and covered; a model of scans is explained."""

import numpy as np

import simulator
from calibration.fit.section import fit_section
from calibration.fit.selective_scan import ScanFit
from simulator.operators.base import Machine
from simulator.operators.selective_scan import CODE, Scans, selective_scan
from simulator.uncertainty.operators import operator_time
from simulator.workload import Workload

hw, rng = simulator.load_hardware("h100"), np.random.default_rng(0)
tokens, heads = 2.0 ** np.arange(6, 15), [8.0, 16.0, 32.0, 48.0]
sizes = [2.0 ** np.arange(0, 6), tokens, heads, [64.0, 128.0, 256.0]]
calls = Scans(Machine.of(hw), *(x.ravel() for x in np.meshgrid(*sizes)))
truth = {"t0_s": 1.2e-5, "chunk_s": 1.5e-6, "e_d": 0.7}
rows = ScanFit(calls, calls.seconds(truth) * np.exp(0.03 * rng.normal(size=calls.tokens.size)))

unseen = (calls.heads == 48.0) | (calls.features == 128.0)
section = fit_section(rows.take(~unseen)).section
for name, constant in section.constants.items():
    assert abs(constant.value - truth[name]) < 4.0 * constant.std_error < 0.1 * truth[name], name
assert section.accuracy["mape"] < 0.04

mine, test = hw.calibrated({("selective_scan", "bf16"): section}), rows.take(unseen)
predicted, guessed = (
    operator_time(selective_scan(test.calls, profile), profile) for profile in (mine, hw)
)
inside = (predicted.lower <= test.seconds) & (test.seconds <= predicted.upper)
assert 0.85 < inside.mean() < 0.97
assert (predicted.lower >= test.calls.estimate(truth).floor).all()
# defaults: less is known
assert (guessed.upper / guessed.lower > predicted.upper / predicted.lower).all()
assert set(predicted.bottlenecks) == {"launch", "latency", "memory"}


def with_scans(w: Workload) -> Workload:
    """Return the workload with scans in place of attention."""
    return w.replace(kind=np.where(w.is_attention, CODE, w.kind))


model = simulator.lower("llama-3.2-1b", phase="prefill", batch=4, seq=4096)
dense, pruned = (with_scans(w) for w in (model, simulator.prune(model, "depth", 0.25)))
scan = dense.take(dense.kind == CODE)
assert scan.flops.sum() == 16 * 6 * 4 * 32 * 4096 * 64**2
assert set(scan.to_dict()["kind"]) == {"selective_scan"}
t0_s = hw.section("selective_scan", "bf16")["t0_s"]
assert simulator.workload_time(scan, hw).total_s > 16 * t0_s
steps = simulator.waterfall(dense, pruned, hw)
assert abs(steps[-1].speedup - simulator.speedup(dense, pruned, hw).speedup) < 1e-9
