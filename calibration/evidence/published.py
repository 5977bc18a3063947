"""Published measurements predicted under their conditions, and the host times of engines that are
fitted to them.

The measured values ship as ``calibration/measurements/``. Each row has its source, its split
(engines are fitted or judged on it), and assumptions about conditions that the source does not
state.

Host times (``simulator/engines/*.yaml``): a request that is served with c - 1 others takes E = P +
o (t_d + h0 + hs c) + R. P is the time of the prefills of all c requests; prompts that arrive during
one decode step share a pass. o is the number of decode steps, t_d the device time of a step, R the
time of the server around the passes, which is fitted to times to the first token. h0 and hs are
fitted to E, which does not depend on how the load generator spaces requests. R differs between
servers by more than one source shows, so the R of an engine is the geometric mean of the fit and of
another source. Then phi, the share of
the other requests' prefills before the first token, is fitted to the time per output token. Each
group of runs (a model on a GPU) has an offset: a common error is attributed to its kernels. Times
to the first token are those of the request's own pass, a share of the other prefills, and R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from calibration.evidence.measurements import published
from calibration.validation.scoring import Comparison, ScoredRows, score
from simulator.arrays import FloatArray
from simulator.capacity import memory
from simulator.codes import Kernel, Phase
from simulator.engines.engine import load_engine, split
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.operators.gemm import Options
from simulator.prediction.requests import dense_seconds
from simulator.prediction.result import Result
from simulator.prediction.table import speedups, table
from simulator.pruning._steps import prune_steps, read_steps
from simulator.serving.steady import prefill_passes
from simulator.uncertainty.forward import forward_passes, ratio_half
from simulator.uncertainty.intervals import workload_time
from simulator.uncertainty.operators import gemm_predicted
from simulator.workload import Workload, WorkloadBatch

MISS = 0.10  # relative error from which the likely reason is printed
# generation of serving runs where the source does not state the version
NO_VERSION: Mapping[str, str] = {"vllm": "v1", "trtllm": "pytorch"}
NOT_USED: Mapping[str, int] = {  # published end-to-end speedups that do not ship, by reason
    "GPU or batch not stated (LLM-Pruner, ShortGPT, FP8 2:4 in vLLM)": 11,
    "share of the attention computed not stated (MInference, A-Shape, InfLLM)": 51,
    "another batch for the pruned model, so no ratio at equal conditions (SliceGPT Table 11)": 2,
    "GPU without a profile (Quadro RTX 6000, RTX 5090 kernels)": 27,
    "not a language model (SAM)": 2,
}
_SCALE = {"s": 1.0, "ms": 1e-3, "s/batch": 1.0}


def compare_dense() -> list[Comparison]:
    """Return published times of dense models in their engines, s, per pass or per request."""
    return [_dense(row) for row in published("dense") if not row["left_out"]]


def compare_speedups(given: bool = False) -> list[Comparison]:
    """Return published speedups of pruned models in their engines; ``given``: of whole models,
    predicted from the measured dense time."""
    rows = [
        r
        for r in published("speedups")
        if not r["left_out"] and not (given and r["scope"] == "projections")
    ]
    return [_speedup(r, given) for r in rows]


def compare_serving(engine: str = "", experts: bool = True) -> list[Comparison]:
    """Return times per output token, s, of the serving runs of one engine, or of all engines. Runs
    whose caches do not fit are excluded; so are models with routed experts, unless ``experts``."""
    rows = [r for r in published("serving") if not r["left_out"] and engine in ("", r["engine"])]
    rows = [r for r in rows if experts or not load_model(r["model"]).experts]
    return [c for c in map(_served, rows) if c is not None]


def compare_throughput() -> list[Comparison]:
    """Return published new tokens/s per GPU of dense and pruned models in servers. They generate
    different numbers of tokens, so only equal lengths compare."""
    return [_throughput(row) for row in published("throughput")]


def compare_gemms(what: str = "2:4") -> list[Comparison]:
    """Return published ratios of a dense GEMM's time to the time of its "2:4" or its "narrower"
    version."""
    return [_gemm_ratio(row) for row in published("gemm_ratios") if row["what"] == what]


def _comparison(row: Mapping[str, str], what: str, where: str, *values: Any) -> Comparison:
    """Return a comparison with the facts of a published row; ``values``: measured, predicted,
    lower, upper."""
    about: dict[str, Any] = {name: row.get(name, "") for name in ("source", "assumed", "reason")}
    about |= {"engine": split(row["engine"])[0] if "engine" in row else "", "gpu": row["hardware"]}
    about |= {"split": row.get("split") or "fit", "own_code": row.get("own_code") == "true"}
    return Comparison(what, where, *values, **about)


def _workload(row: Mapping[str, str], engine: str, **others: Any) -> Workload:
    defaults = {"batch": 1, "seq": 1, "new_tokens": 0, "devices": 1}
    return lower(
        load_model(row["model"]),
        phase=row["phase"],
        engine=engine,
        **{name: int(row[name] or value) for name, value in defaults.items()},
        **{"dtype": row.get("dtype") or "bf16", "weight_dtype": row.get("weight_dtype") or None},
        **others,
    )


def _where(row: Mapping[str, str], scope: str = "") -> str:
    new = f" + {row['new_tokens']}" if row["new_tokens"] not in ("", "0") else ""
    devices = f" x {row['devices']}" if row["devices"] not in ("", "1") else ""
    return (
        f"{row['gpu']}{devices}, {scope or row['phase']}, batch {row['batch']}, seq"
        f" {row['seq']}{new}"
    )


def _dense(row: Mapping[str, str]) -> Comparison:
    w = _workload(row, row["engine"])
    # the vLLM tables ran FlashAttention-2
    stack = "vllm" if "FlashAttention-2" in row["framework"] else ""
    time, m = workload_time(w, load_hardware(row["hardware"], stack)), w.meta
    measured = float(row["value"])
    if row["metric"] == "tokens_per_s":
        measured = dense_seconds(measured, m.asked)
    elif row["metric"] == "all_tokens_per_s":
        measured = m.batch * (m.seq + m.new_tokens) / measured
    what = f"{row['model']}, {row['framework']}"
    return _comparison(
        row, what, _where(row), measured, time.total_s, time.total_lower_s, time.total_upper_s
    )


def _speedup(row: Mapping[str, str], given: bool) -> Comparison:
    part, removed = row["scope"] == "projections", row["sparsity"]
    dense = _workload(row, "" if part else row["engine"])
    pruned = prune_steps(dense, read_steps(pruning_text(row)))
    if part:  # without the operators that pruning adds
        dense, pruned = (
            w.take(
                w.is_role("q", "k", "v", "o", "gate", "up", "down") & (w.layer >= 0) & ~w.overhead
            )
            for w in (dense, pruned)
        )
    before, after, m = float(row["dense"]), float(row["pruned"]), dense.meta
    tokens, dense_s = row["unit"].startswith("tokens"), None
    if given and tokens:
        dense_s = dense_seconds(before, m.asked)
    elif given:
        dense_s = before * _SCALE[row["unit"]]
    (s,) = speedups(dense, [pruned], load_hardware(row["hardware"]), dense_s=dense_s)
    percent = removed if "=" in removed else f"{100 * float(removed):.3g} %"
    first = f" from layer {int(row['first_layer'])}" if row["first_layer"] else ""
    where = _where(row, "projections of a layer" if part else row["phase"])
    ratio = after / before if tokens else before / after
    what = f"{row['method']}, {row['model']}, {percent}{first}"
    return _comparison(row, what, where, ratio, s.speedup, s.lower, s.upper)


def pruning_text(row: Mapping[str, str]) -> str:
    """Return the pruning of a published speedup as a text of ``--prune``."""
    last = row["last_layer"] or len(load_model(row["model"]).layers) - 1
    layers = f"layers={row['first_layer']}-{last}" if row["first_layer"] else ""
    fractions = row["sparsity"].replace(",", " ")
    return " ".join(filter(None, (row["family"], fractions, layers, row["options"])))


def _served(row: Mapping[str, str]) -> Comparison | None:
    served = serving_workload(row)
    if served is None:
        return None
    w, hw = served
    (s,) = speedups(w, [w], hw)
    gpu = row["hardware"].partition("_")[0].upper()
    where = _where({**row, "batch": row["concurrency"], "gpu": gpu}, "serve")
    what = f"{row['model']}, {row['weight_dtype']}, {row['engine']} {row['version']}".rstrip()
    return _comparison(
        row,
        what,
        where,
        float(row["tpot_s"]),
        s.dense_tpot_s,
        s.dense_tpot_lower,
        s.dense_tpot_upper,
    )


def serving_workload(row: Mapping[str, str]) -> tuple[Workload, HardwareProfile] | None:
    """Return workload and hardware of a row of the serving table; None where its caches do not
    fit."""
    weight = row["weight_dtype"]
    hw = load_hardware(row["hardware"])
    engine = load_engine(row["engine"])
    limit = engine.limit(hw.memory_bytes, hw.name)
    version = row["version"] or NO_VERSION.get(row["engine"], "")
    w = _workload(
        {
            **row,
            "phase": "serve",
            "batch": row["concurrency"],
            "dtype": "fp8" if weight == "fp8_block" else weight,
        },
        f"{row['engine']}@{version}" if version and engine.generations else row["engine"],
        parallel=row["parallel"],
        token_budget=None if limit is None else limit.tokens,
        kv_dtype=row["kv_dtype"] or None,
    )
    return (w, hw) if memory(w, hw, share=1.0).fits else None


def _throughput(row: Mapping[str, str]) -> Comparison:
    """Predict a server that always has ``batch`` requests, or as many as fit."""
    request: dict[str, Any] = {name: row[name] for name in ("engine", "dtype", "kv_dtype")}
    request |= {name: int(row[name]) for name in ("devices", "seq", "new_tokens")}

    def predicted(batch: int) -> Result:
        prune = row["prune"] or "depth 0.5"  # a dense row has the dense side of any result
        at = {**request, "batch": batch, "phase": "serve"}
        return table(row["model"], row["hardware"], prune=prune, **at).rows[0]

    which, batch = "pruned" if row["prune"] else "dense", int(row["batch"])
    r = predicted(min(batch, getattr(predicted(batch), f"{which}_largest_batch")))
    rate = (r.tokens_per_s if row["prune"] else r.dense_tokens_per_s) or 0.0
    s, low, high = (getattr(r, f"{which}_{end}") for end in ("s", "lower", "upper"))
    counted = "" if row["split"] == "judge" else " (not counted)"
    what = f"{row['model']} in {row['dtype']}, {row['prune'] or 'dense'}{counted}"
    where = _where({**row, "batch": str(r.batch)}, "serve")
    measured = float(row["tokens_per_s"])
    ends = (rate / r.devices * s / time for time in (s, high, low))
    return _comparison(row, what, where, measured, *ends)


def _gemm_ratio(row: Mapping[str, str]) -> Comparison:
    hw = load_hardware(row["hardware"])
    m, n, k, pruned_n, pruned_k = (
        np.array([int(row[name])]) for name in ("m", "n", "k", "pruned_n", "pruned_k")
    )
    kernel, density = (Kernel.SPARSE24, 0.5) if row["what"] == "2:4" else (Kernel.DENSE, 1.0)
    # these benchmarks repeat one GEMM, so its weights may stay in the L2 cache
    options = Options(row["dtype"], copies=1)
    dense, ((_, dense_error),) = gemm_predicted(m, n, k, hw, options)
    pruned_options = replace(options, kernel=np.array([kernel]), density=density)
    pruned, ((_, pruned_error),) = gemm_predicted(m, pruned_n, pruned_k, hw, pruned_options)
    ratio = float(dense.seconds[0] / pruned.seconds[0])
    width = float(np.exp(ratio_half(dense_error, pruned_error))[0])
    shape = f"{row['m']}x{row['n']}x{row['k']}"
    if row["what"] != "2:4":
        shape += f" to {row['m']}x{row['pruned_n']}x{row['pruned_k']}"
    if row["gemms"] != "1":
        shape += f", {row['gemms']} GEMMs"
    measured = float(row["dense_us"]) / float(row["pruned_us"])
    where = f"{row['gpu']}, {row['dtype']}"
    return _comparison(row, shape, where, measured, ratio, ratio / width, ratio * width)


PRIOR, PRIOR_LOG_SD = (5e-4, 3e-5), 0.5  # h0 and hs, s, of a scheduler in Python
# log standard deviations of a group's offset and of one run
OFFSET_LOG_SD, NOISE_LOG_SD = 0.08, 0.06
# most rows of a group that count as independent, and rows that a group needs
INDEPENDENT_ROWS, FEWEST = 20.0, 10
# Engines that overlap the host with the device. What is left, s per pass and per sequence, is less
# than what a server adds to a request, and a fit without one model finds 0 to 0.5 ms. These values
# are assumed; short steps need them. Runs do not show the time per sequence: from 0 to 6 us, the
# median error of times per token is 4.9 to 5.1 %.
OVERLAPPED: Mapping[str, tuple[float, float]] = {"trtllm": (1e-4, 1.5e-6)}
# Engines that compute all waiting prompts before they resume decoding: a request waits for half of
# the prompts that arrive with it, on average. Not fitted.
PROMPTS_FIRST: Mapping[str, float] = {"sglang": 0.5}
FEW_TOKENS = 4.0  # most output tokens of runs that show a server's time per request


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

    def request(self, h0: float, hs: float, server_s: float) -> FloatArray:
        decode = self.new_tokens * (self.step_s + h0 + hs * self.concurrency)
        return np.asarray(self.prefill_s + decode + server_s)

    @property
    def ttft_s(self) -> FloatArray:  # measured
        return np.asarray(self.request_s - self.new_tokens * self.tpot_s)

    def tpot(self, h0: float, hs: float, phi: float) -> FloatArray:
        waits = (1.0 - phi) * (self.prefill_s - self.pass_s) / self.new_tokens
        return np.asarray(self.step_s + h0 + hs * self.concurrency + waits)


class HostParameters(NamedTuple):
    each_pass_s: float  # h0
    each_sequence_s: float  # hs
    prefill_wait: float  # phi
    first_wait: float  # the same in times to the first token
    each_request_s: float  # R


@dataclass(frozen=True)
class HeldOut:
    """A group of runs whose model was held out of the fit."""

    engine: str
    model: str
    hardware: str
    dtype: str
    group: Group
    tpot_s: FloatArray  # predicted
    request_s: FloatArray  # predicted

    @property
    def experts(self) -> bool:
        return load_model(self.model).experts > 0

    @property
    def ratio(self) -> FloatArray:
        return self.tpot_s / self.group.tpot_s


def ratio_scores(groups: Sequence[HeldOut]) -> dict[str, float]:
    """Return the scores of the times per token of groups, and the number of their rows ("runs")."""
    ratio = np.concatenate([x.ratio for x in groups])
    return {**score(ScoredRows(np.ones(len(ratio)), ratio)), "runs": float(len(ratio))}


@lru_cache(maxsize=1)
def groups() -> Mapping[tuple[str, ...], Group]:
    """Return the serving runs that fit their memory, with predicted device times, by engine,
    version, model, hardware and format of the weights."""
    runs: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for row in published("serving"):
        served = None if row["left_out"] else serving_workload(row)
        if served is None:
            continue
        w, hw = served
        p = forward_passes(WorkloadBatch.of([w]), hw)
        phase = p.workloads.groups.segment // 3
        c, o, seq, tpot, ttft = (
            float(row[n]) for n in ("concurrency", "new_tokens", "seq", "tpot_s", "ttft_s")
        )
        step, prefill = (
            float(p.group_s[0, phase == at].sum()) for at in (Phase.DECODE, Phase.PREFILL)
        )
        alone = prefill / min(float(prefill_passes(p.workloads)[0]), c)
        key = (row["engine"], row["version"], row["model"], row["hardware"], row["weight_dtype"])
        runs.setdefault(key, []).append(
            (c, o, seq, step / o, prefill, alone, tpot, ttft + o * tpot)
        )
    return {
        key: Group(*np.array(values).T) for key, values in runs.items() if len(values) >= FEWEST
    }


def fit_engine(engine: str, without: str = "") -> HostParameters:
    """Return the parameters of an engine, fitted to its dense models except one: experts are less
    certain."""
    runs = [
        g
        for k, g in groups().items()
        if k[0] == engine and k[2] != without and not load_model(k[2]).experts
    ]
    return fit_hosts(engine, runs, [request_elsewhere(engine)])


def request_elsewhere(engine: str) -> float:
    """Return R of an engine in a source other than the fitted one, s: runs of four output tokens
    that are sent at once show the whole time per request, kernels included."""
    runs = [row for row in published("at_once") if row["engine"] == engine]
    times = [float(row["new_tokens"]) / float(row["tokens_per_s"]) for row in runs]
    few = [float(row["new_tokens"]) <= FEW_TOKENS for row in runs]
    return float(np.median(np.array(times)[few]))


def fit_hosts(
    engine: str, runs: Sequence[Group], elsewhere: Sequence[float] = ()
) -> HostParameters:
    """Return the parameters of runs; ``elsewhere``: R in other sources, s."""

    def errors(predicted: Callable[[Group], FloatArray], name: str) -> FloatArray:
        logs = [np.log(predicted(g) / getattr(g, name)) / np.sqrt(len(g.seq)) for g in runs]
        return np.concatenate(logs)

    def ttft_errors(server_s: float, wait: float) -> FloatArray:
        return errors(lambda g: g.pass_s + wait * (g.prefill_s - g.pass_s) + server_s, "ttft_s")

    how: dict[str, Any] = {"loss": "soft_l1", "f_scale": 0.01, "bounds": (0.0, 1.0)}
    if (first := PROMPTS_FIRST.get(engine)) is not None:
        (server_s,) = least_squares(lambda q: ttft_errors(q[0], first), [0.05], **how).x
    else:
        server_s = least_squares(lambda q: ttft_errors(*q), [0.05, 0.1], **how).x[0]
    typical_s = float(np.exp(np.log([server_s, *elsewhere]).mean()))
    if first is None:
        (first,) = least_squares(lambda q: ttft_errors(typical_s, q[0]), [0.1], **how).x
    h0, hs = OVERLAPPED.get(engine, PRIOR)
    if engine not in OVERLAPPED:
        prior = np.log(PRIOR)

        def residuals(q: FloatArray) -> FloatArray:
            out = [(q[:2] - prior) / PRIOR_LOG_SD, q[2:] / OFFSET_LOG_SD]
            each_pass, each_sequence = np.exp(q[:2])
            for group, offset in zip(runs, q[2:], strict=True):
                predicted = group.request(each_pass, each_sequence, server_s)
                log = np.log(predicted / group.request_s) + offset
                out.append(np.sqrt(INDEPENDENT_ROWS / len(log)) * log / NOISE_LOG_SD)
            return np.concatenate(out)

        start = np.r_[prior, np.zeros(len(runs))]
        h0, hs = np.exp(least_squares(residuals, start, loss="soft_l1").x[:2]).tolist()
    phi = PROMPTS_FIRST.get(engine)
    if phi is None:
        (phi,) = least_squares(
            lambda q: errors(lambda g: g.tpot(h0, hs, q[0]), "tpot_s"), [0.1], **how
        ).x
    return HostParameters(h0, hs, float(phi), float(first), typical_s)


@lru_cache(maxsize=1)
def held_out_models() -> tuple[HeldOut, ...]:
    """Return every group, predicted by parameters that are fitted to the runs of other models."""
    out, hosts = [], dict[tuple[str, str], HostParameters]()
    for (engine, _, model, hardware, dtype), group in groups().items():
        if (engine, model) not in hosts:
            hosts[engine, model] = fit_engine(engine, without=model)
        p = hosts[engine, model]
        times = group.tpot(*p[:3]), group.request(*p[:2], p[4])
        out.append(HeldOut(engine, model, hardware, dtype, group, *times))
    return tuple(out)


def host_lines() -> Iterator[str]:
    for engine in sorted({key[0] for key in groups()}):
        p = fit_engine(engine)
        host = f"pass {1e3 * p.each_pass_s:.2f} ms, sequence {1e6 * p.each_sequence_s:.0f} us"
        first = f"first_wait {p.first_wait:.2f}, request {1e3 * p.each_request_s:.0f} ms"
        yield f"{engine}: {host}, prefill_wait {p.prefill_wait:.2f}, {first}"
