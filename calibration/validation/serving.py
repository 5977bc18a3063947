"""Fit the host times of serving engines to serving runs, and evaluate them on held-out models.

A request that is served with c - 1 others takes E = P + o (t_d + h0 + hs c): P is the time of the prefills of all c
requests, of which those that arrive during one decode step share a pass, and o are the decode steps. h0 and hs are
fitted to E, which does not depend on how the load generator spaces requests; then phi, the share of the other requests'
prefills before the first token, is fitted to the time per output token. A common error of a group of runs (a model on a
GPU) is attributed to its kernels, not to the host: each group has an offset.

Use :func:`fit_hosts` for the values of ``simulator/engines/*.yaml``, :func:`held_out_models` for their errors on
held-out models: ``python -m calibration.validation.serving`` prints both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from simulator.prediction.serving import prefill_passes

from calibration.measurements import published
from calibration.validation.published import serving_workload
from simulator.arrays import FloatArray
from simulator.models.library import load_model
from simulator.uncertainty.forward import forward_passes
from simulator.workload import Phase
from simulator.workload_batch import WorkloadBatch

PRIOR: tuple[float, float] = (5e-4, 3e-5)
"""Prior of h0 and hs, s: a scheduler in Python."""
PRIOR_LOG_SD = 0.5
OFFSET_LOG_SD, NOISE_LOG_SD, INDEPENDENT_ROWS = 0.08, 0.06, 20.0
"""Log standard deviations of a group's offset and of one run; rows of a group that count as independent."""

NO_HOST: tuple[str, ...] = ("trtllm",)
"""Engines with a compiled step, whose host time is hidden: 0, not fitted."""
PROMPTS_FIRST: Mapping[str, float] = {"sglang": 0.5}
"""Engines that compute all waiting prompts before they resume decoding: requests that arrive together wait for half of
the prompts on average. Not fitted."""
FEWEST = 10
"""Runs that a group needs."""


@dataclass(frozen=True)
class Group:
    """Runs of one model on one GPU; times in s."""

    concurrency: FloatArray
    new_tokens: FloatArray
    seq: FloatArray
    step_s: FloatArray  # device time of a decode step of all requests
    prefill_s: FloatArray  # device time of the prefills of all requests
    pass_s: FloatArray  # device time until a prompt is computed, once its first pass starts
    tpot_s: FloatArray  # measured
    request_s: FloatArray  # measured

    def request(self, h0: float, hs: float) -> FloatArray:
        """Return the predicted time of a request."""
        steps = self.step_s + h0 + hs * self.concurrency
        return np.asarray(self.prefill_s + self.new_tokens * steps)

    def tpot(self, h0: float, hs: float, phi: float) -> FloatArray:
        """Return the predicted time per output token."""
        waits = (1.0 - phi) * (self.prefill_s - self.pass_s) / self.new_tokens
        return np.asarray(self.step_s + h0 + hs * self.concurrency + waits)


Key = tuple[str, str, str, str, str]
"""Engine, version, model, hardware, format of the weights."""


@dataclass(frozen=True)
class HostParameters:
    """Host time per pass and per sequence in it, s, and the share of other prefills before a request's first token."""

    each_pass_s: float
    each_sequence_s: float
    prefill_wait: float


@dataclass(frozen=True)
class HeldOut:
    """Errors of a group of runs whose model was held out of the fit."""

    engine: str
    model: str
    hardware: str
    dtype: str
    group: Group
    log_ratio: FloatArray  # of predicted over measured time per token
    request_log_ratio: FloatArray  # of predicted over measured time of a request

    @property
    def experts(self) -> bool:
        """Whether the model has routed experts."""
        return load_model(self.model).experts > 0

    @property
    def tpot_error(self) -> float:
        """Median absolute error of the time per token."""
        return median_of_logs(self.log_ratio)

    @property
    def tpot_bias(self) -> float:
        """Median error of the time per token."""
        return float(np.expm1(np.median(self.log_ratio)))

    @property
    def request_error(self) -> float:
        """Median absolute error of the time of a request."""
        return median_of_logs(self.request_log_ratio)


def median_of_logs(log_ratio: FloatArray) -> float:
    """Return the median absolute error of the logs of ratios."""
    return float(np.median(np.abs(np.expm1(log_ratio))))


@lru_cache(maxsize=1)
def groups() -> Mapping[Key, Group]:
    """Return the serving runs that fit their memory, by group, with the predicted device times."""
    runs: dict[Key, list[tuple[float, ...]]] = {}
    for row in published("serving"):
        served = None if row["left_out"] else serving_workload(row)
        if served is None:
            continue
        w, hw = served
        p = forward_passes(WorkloadBatch.of([w]), hw)
        phase = p.workloads.groups.segment // 3
        c, o, seq, tpot, ttft = (float(row[n]) for n in ("concurrency", "new_tokens", "seq", "tpot_s", "ttft_s"))
        step, prefill = (float(p.group_s[0, phase == at].sum()) for at in (Phase.DECODE, Phase.PREFILL))
        alone = prefill / min(float(prefill_passes(p.workloads)[0]), c)
        key = (row["engine"], row["version"], row["model"], row["hardware"], row["weight_dtype"])
        runs.setdefault(key, []).append((c, o, seq, step / o, prefill, alone, tpot, ttft + o * tpot))
    return {key: Group(*np.array(values).T) for key, values in runs.items() if len(values) >= FEWEST}


def fitted() -> dict[Key, Group]:
    """Return the groups that hosts are fitted to: dense models, as kernels of routed experts are less certain."""
    return {key: group for key, group in groups().items() if not load_model(key[2]).experts}


def fit_hosts(engine: str, runs: Sequence[Group]) -> HostParameters:
    """Return the parameters of an engine, fitted to some groups."""
    h0 = hs = 0.0
    if engine not in NO_HOST:
        prior = np.log(PRIOR)

        def residuals(q: FloatArray) -> FloatArray:
            out = [(q[:2] - prior) / PRIOR_LOG_SD, q[2:] / OFFSET_LOG_SD]
            for group, offset in zip(runs, q[2:], strict=True):
                log = np.log(group.request(*np.exp(q[:2])) / group.request_s) + offset
                out.append(np.sqrt(INDEPENDENT_ROWS / len(log)) * log / NOISE_LOG_SD)
            return np.concatenate(out)

        h0, hs = np.exp(least_squares(residuals, np.r_[prior, np.zeros(len(runs))], loss="soft_l1").x[:2]).tolist()
    if engine in PROMPTS_FIRST:
        return HostParameters(h0, hs, PROMPTS_FIRST[engine])

    def tpot_residuals(q: FloatArray) -> FloatArray:
        logs = [np.log(g.tpot(h0, hs, q[0]) / g.tpot_s) / np.sqrt(len(g.tpot_s)) for g in runs]
        return np.concatenate(logs)

    phi: Any = least_squares(tpot_residuals, [0.1], loss="soft_l1", f_scale=0.01, bounds=([0.0], [1.0])).x[0]
    return HostParameters(h0, hs, float(phi))


def held_out_models() -> list[HeldOut]:
    """Return the errors of every group, predicted with parameters fitted to the runs of other models."""
    out, hosts = [], dict[tuple[str, str], HostParameters]()
    for (engine, _, model, hardware, dtype), group in groups().items():
        if (engine, model) not in hosts:
            others = [g for key, g in fitted().items() if key[0] == engine and key[2] != model]
            hosts[engine, model] = fit_hosts(engine, others)
        p = hosts[engine, model]
        tpot = np.log(group.tpot(p.each_pass_s, p.each_sequence_s, p.prefill_wait) / group.tpot_s)
        request = np.log(group.request(p.each_pass_s, p.each_sequence_s) / group.request_s)
        out.append(HeldOut(engine, model, hardware, dtype, group, tpot, request))
    return out


def main() -> None:
    """Print the parameters of every engine, and its errors on held-out models."""
    for engine in sorted({key[0] for key in groups()}):
        p = fit_hosts(engine, [g for key, g in fitted().items() if key[0] == engine])
        host = f"pass {1e3 * p.each_pass_s:.2f} ms, sequence {1e6 * p.each_sequence_s:.0f} us"
        held_out = [x for x in held_out_models() if x.engine == engine]
        error = median_of_logs(np.concatenate([x.log_ratio for x in held_out if not x.experts]))
        print(f"{engine}: {host}, prefill_wait {p.prefill_wait:.2f}; TPOT of held-out dense models {100 * error:.1f} %")
        for x in held_out:
            tpot = f"TPOT {100 * x.tpot_error:.1f} % (bias {100 * x.tpot_bias:+.1f})"
            request = f"request {100 * x.request_error:.1f} %"
            print(f"  {x.model} {x.dtype} on {x.hardware}, {len(x.log_ratio)} runs: {tpot}, {request}")


if __name__ == "__main__":
    main()
