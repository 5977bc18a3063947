"""Fit the host times of serving engines (``simulator/engines/*.yaml``) to serving runs, and predict held-out models.

A request that is served with c - 1 others takes E = P + o (t_d + h0 + hs c): P is the time of the prefills of all c
requests, of which those that arrive during one decode step share a pass, and o are the decode steps. h0 and hs are
fitted to E, which does not depend on how the load generator spaces requests; then phi, the share of the other requests'
prefills before the first token, is fitted to the time per output token. Each group of runs (a model on a GPU) has an
offset, because a common error is attributed to its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from calibration.evidence.published import serving_workload
from calibration.evidence.scoring import ScoredRows, score
from calibration.measurements import published
from simulator.arrays import FloatArray
from simulator.codes import Phase
from simulator.models.library import load_model
from simulator.prediction.serving import prefill_passes
from simulator.uncertainty.forward import forward_passes
from simulator.workload import WorkloadBatch

PRIOR, PRIOR_LOG_SD = (5e-4, 3e-5), 0.5  # of h0 and hs, s: a scheduler in Python
OFFSET_LOG_SD, NOISE_LOG_SD = 0.08, 0.06  # log standard deviations of a group's offset and of one run
INDEPENDENT_ROWS, FEWEST = 20.0, 10  # rows of a group that count as independent, and that it needs
NO_HOST = ("trtllm",)  # engines with a compiled step, whose host time is hidden: 0, not fitted
PROMPTS_FIRST: Mapping[str, float] = {"sglang": 0.5}
"""Engines that compute all waiting prompts before they resume decoding: requests that arrive together wait for half of
the prompts on average. Not fitted."""


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
        return np.asarray(self.prefill_s + self.new_tokens * (self.step_s + h0 + hs * self.concurrency))

    def tpot(self, h0: float, hs: float, phi: float) -> FloatArray:
        """Return the predicted time per output token."""
        waits = (1.0 - phi) * (self.prefill_s - self.pass_s) / self.new_tokens
        return np.asarray(self.step_s + h0 + hs * self.concurrency + waits)


class HostParameters(NamedTuple):
    """Host time per pass and per sequence in it, s, and the share of other prefills before a request's first token."""

    each_pass_s: float
    each_sequence_s: float
    prefill_wait: float


@dataclass(frozen=True)
class HeldOut:
    """A group of runs whose model was held out of the fit, with its predicted times, s."""

    engine: str
    model: str
    hardware: str
    dtype: str
    group: Group
    tpot_s: FloatArray
    request_s: FloatArray

    @property
    def experts(self) -> bool:
        """Whether the model has routed experts."""
        return load_model(self.model).experts > 0

    @property
    def ratio(self) -> FloatArray:
        """Predicted over measured time per token."""
        return self.tpot_s / self.group.tpot_s


def ratio_scores(groups: Sequence[HeldOut]) -> dict[str, float]:
    """Return the scores of the times per token of all runs of some groups."""
    ratio = np.concatenate([x.ratio for x in groups])
    return score(ScoredRows(np.ones(len(ratio)), ratio))


@lru_cache(maxsize=1)
def groups() -> Mapping[tuple[str, ...], Group]:
    """Return the serving runs that fit their memory by engine, version, model, hardware and format of the weights, with
    the predicted device times."""
    runs: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
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


def fit_engine(engine: str, without: str = "") -> HostParameters:
    """Return the parameters of an engine, fitted to its dense models except one; kernels of routed experts are less
    certain."""
    runs = [g for k, g in groups().items() if k[0] == engine and k[2] != without and not load_model(k[2]).experts]
    return fit_hosts(engine, runs)


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


@lru_cache(maxsize=1)
def held_out_models() -> tuple[HeldOut, ...]:
    """Return every group, predicted with parameters fitted to the runs of other models."""
    out, hosts = [], dict[tuple[str, str], HostParameters]()
    for (engine, _, model, hardware, dtype), group in groups().items():
        if (engine, model) not in hosts:
            hosts[engine, model] = fit_engine(engine, without=model)
        p = hosts[engine, model]
        out.append(HeldOut(engine, model, hardware, dtype, group, group.tpot(*p), group.request(*p[:2])))
    return tuple(out)


def host_lines() -> Iterator[str]:
    """Yield the parameters of every engine, and its errors on held-out models."""
    for engine in sorted({key[0] for key in groups()}):
        p = fit_engine(engine)
        host = f"pass {1e3 * p.each_pass_s:.2f} ms, sequence {1e6 * p.each_sequence_s:.0f} us"
        held_out = [x for x in held_out_models() if x.engine == engine]
        error = ratio_scores([x for x in held_out if not x.experts])["median"]
        yield f"{engine}: {host}, prefill_wait {p.prefill_wait:.2f}; TPOT of held-out dense models {100 * error:.1f} %"
        for x in held_out:
            tpot, request = ratio_scores([x]), score(ScoredRows(x.group.request_s, x.request_s))
            errors = f"TPOT {100 * tpot['median']:.1f} % (bias {100 * tpot['median bias']:+.1f})"
            runs = f"{x.model} {x.dtype} on {x.hardware}, {len(x.ratio)} runs"
            yield f"  {runs}: {errors}, request {100 * request['median']:.1f} %"
