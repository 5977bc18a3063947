"""Host times of serving engines, fitted to serving runs, and judged with a model left out.

A request that is served beside c - 1 others takes E = c t_p + o (t_d + h0 + hs c): its own and their prefills, and o
steps. h0 and hs are fitted to E, which does not depend on how the load generator spaces requests; then phi, the share
of the others' prefills before the first token, to the time per output token. What a whole group of runs (a model on a
GPU) is off by is its kernels' error, not its host's: each has an offset of its own.

Use :func:`fit_hosts` for the values of ``simulator/engines/*.yaml``, :func:`leave_models_out` to judge them:
``python -m calibration.validation.serving`` prints both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from calibration.measurements import published
from calibration.validation.published import serving_workload
from simulator.arrays import FloatArray
from simulator.uncertainty.forward import forward_passes
from simulator.workload import Phase
from simulator.workload_batch import WorkloadBatch

PRIOR: tuple[float, float] = (5e-4, 3e-5)
"""h0 and hs of a scheduler in Python, s, where nothing is known."""
PRIOR_LOG_SD = 0.5
OFFSET_LOG_SD, NOISE_LOG_SD, ALIKE_ROWS = 0.08, 0.06, 20.0
"""Of a group's offset and of one run; rows of a group that count as independent."""

NO_HOST: tuple[str, ...] = ("trtllm",)
"""Engines whose step is compiled: nothing is fitted, nothing shows."""
PROMPTS_FIRST: Mapping[str, float] = {"sglang": 0.5}
"""Engines that compute all waiting prompts before they go on decoding: requests that came together wait for half of
them on average. Not fitted."""
FEWEST = 10


@dataclass(frozen=True)
class Group:
    """Runs of one model on one GPU; times in s."""

    concurrency: FloatArray
    new_tokens: FloatArray
    step_s: FloatArray  # of the device, a decode step of all
    prefill_s: FloatArray  # of the device, one prompt
    tpot_s: FloatArray  # measured, as the next
    request_s: FloatArray

    def request(self, h0: float, hs: float) -> FloatArray:
        steps = self.step_s + h0 + hs * self.concurrency
        return np.asarray(self.concurrency * self.prefill_s + self.new_tokens * steps)

    def tpot(self, h0: float, hs: float, phi: float) -> FloatArray:
        waits = (1.0 - phi) * (self.concurrency - 1.0) * self.prefill_s / self.new_tokens
        return np.asarray(self.step_s + h0 + hs * self.concurrency + waits)


Key = tuple[str, str, str, str, str]
"""Engine, version, model, hardware, format of the weights."""


@dataclass(frozen=True)
class Fitted:
    """Host time of a pass and of a sequence in it, s, and the share of prefills a request waits for first."""

    each_pass_s: float
    each_sequence_s: float
    prefill_wait: float


@dataclass(frozen=True)
class LeftOut:
    """Errors of a group of runs whose model the fit did not see."""

    engine: str
    model: str
    hardware: str
    dtype: str
    rows: int
    tpot_error: float  # median absolute
    tpot_bias: float
    request_error: float
    logs: FloatArray  # of predicted over measured time per token


@lru_cache(maxsize=1)
def groups() -> Mapping[Key, Group]:
    """The serving runs that fit their memory, by group, with the device's part of their prediction."""
    rows: dict[Key, list[tuple[float, ...]]] = {}
    for row in published("serving"):
        found = None if row["left_out"] else serving_workload(row)
        if found is None:
            continue
        w, hw = found
        p = forward_passes(WorkloadBatch.of([w]), hw)
        phase = p.workloads.groups.segment // 3
        c, o, tpot, ttft = (float(row[name]) for name in ("concurrency", "new_tokens", "tpot_s", "ttft_s"))
        step, prefill = (float(p.group_s[0, phase == at].sum()) for at in (Phase.DECODE, Phase.PREFILL))
        key = (row["engine"], row["version"], row["model"], row["hardware"], row["weight_dtype"])
        rows.setdefault(key, []).append((c, o, step / o, prefill / c, tpot, ttft + o * tpot))
    return {key: Group(*np.array(values).T) for key, values in rows.items() if len(values) >= FEWEST}


def fit_hosts(engine: str, found: Sequence[Group]) -> Fitted:
    """Parameters of an engine from some groups."""
    h0 = hs = 0.0
    if engine not in NO_HOST:
        prior = np.log(PRIOR)

        def left(q: FloatArray) -> FloatArray:
            out = [(q[:2] - prior) / PRIOR_LOG_SD, q[2:] / OFFSET_LOG_SD]
            for group, offset in zip(found, q[2:], strict=True):
                log = np.log(group.request(*np.exp(q[:2])) / group.request_s) + offset
                out.append(np.sqrt(ALIKE_ROWS / len(log)) * log / NOISE_LOG_SD)
            return np.concatenate(out)

        h0, hs = np.exp(least_squares(left, np.r_[prior, np.zeros(len(found))], loss="soft_l1").x[:2]).tolist()
    if engine in PROMPTS_FIRST:
        return Fitted(h0, hs, PROMPTS_FIRST[engine])

    def waits(q: FloatArray) -> FloatArray:
        logs = [np.log(g.tpot(h0, hs, q[0]) / g.tpot_s) / np.sqrt(len(g.tpot_s)) for g in found]
        return np.concatenate(logs)

    phi: Any = least_squares(waits, [0.1], loss="soft_l1", f_scale=0.01, bounds=([0.0], [1.0])).x[0]
    return Fitted(h0, hs, float(phi))


def leave_models_out() -> list[LeftOut]:
    """Every group, predicted with parameters that the runs of other models gave."""
    out = []
    for (engine, _, model, hardware, dtype), group in groups().items():
        others = [g for key, g in groups().items() if key[0] == engine and key[2] != model]
        p = fit_hosts(engine, others)
        hosts = p.each_pass_s, p.each_sequence_s
        tpot = np.log(group.tpot(*hosts, p.prefill_wait) / group.tpot_s)
        request = np.log(group.request(*hosts) / group.request_s)
        errors = [float(np.median(np.abs(np.expm1(logs)))) for logs in (tpot, request)]
        bias = float(np.expm1(np.median(tpot)))
        out.append(LeftOut(engine, model, hardware, dtype, len(tpot), errors[0], bias, errors[1], tpot))
    return out


def main() -> None:
    """Print the parameters of every engine, and its errors with a model left out."""
    for engine in sorted({key[0] for key in groups()}):
        p = fit_hosts(engine, [g for key, g in groups().items() if key[0] == engine])
        host = f"pass {1e3 * p.each_pass_s:.2f} ms, sequence {1e6 * p.each_sequence_s:.0f} us"
        found = [x for x in leave_models_out() if x.engine == engine]
        error = float(np.median(np.abs(np.expm1(np.concatenate([x.logs for x in found])))))
        print(f"{engine}: {host}, prefill_wait {p.prefill_wait:.2f}; TPOT with its model left out {100 * error:.1f} %")
        for x in found:
            tpot = f"TPOT {100 * x.tpot_error:.1f} % (bias {100 * x.tpot_bias:+.1f})"
            request = f"request {100 * x.request_error:.1f} %"
            print(f"  {x.model} {x.dtype} on {x.hardware}, {x.rows} runs: {tpot}, {request}")


if __name__ == "__main__":
    main()
