"""Peers beside prunesim in one run on one machine: ``python tests/benchmarks/peers.py``.

Each peer is installed from PyPI into a virtual environment of its own under a temporary folder
(``--folder`` keeps it) and asked, by the fastest way that was found, for the times of GEMMs and of
whole models. Printed: the tables of ``docs/peers.md``. Rates are per second of CPU time (so a busy
machine slows nobody more than another), the best of three. GEMMs are measured shapes whose (n, k)
neither prunesim's fit nor aiconfigurator's table has seen. Whole models are the published times of
``python -m calibration.evidence``: serving runs, predicted by prunesim without the tested model's
runs, and dense times of sources that no fit used. A peer answers the rows that it can; its error is
next to prunesim's on the same rows. A peer that cannot be installed or does not answer is reported,
with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import simulator
from calibration.evidence.measurements import published
from calibration.evidence.published import (
    compare_dense,
    compare_serving,
    groups,
    held_out_models,
    serving_workload,
)
from calibration.fit.gemm import fit_gemm, products
from calibration.measurements import load_measurements
from calibration.records.screening import rotated_copies
from simulator.operators.base import Machine
from simulator.prediction.sweep import Grid, piece_results

TABLE, DEVICE = "h100_sxm/gemm/trtllm", "h100_sxm"
INSTALL_S, RUN_S = 420.0, 900.0

HARNESS = """
import importlib.metadata, itertools, json, sys, time
task = json.load(open(sys.argv[1]))
out = {"version": importlib.metadata.version(task["package"])}
def rate(call, items, most_s=2.0):
    best, following = 0.0, itertools.cycle(items)
    for _ in range(3):
        began, done = time.process_time(), 0
        while time.process_time() - began < most_s and done < 20000:
            call(next(following))
            done += 1
        best = max(best, done / (time.process_time() - began))
    return best
def answered(row):
    try:
        first, step = map(float, answer(row))
    except Exception:  # not one of its models, GPUs, formats or engines
        return None
    return {"prefill": first, "generate": first + (row["new"] - 1) * step}.get(row["phase"], step)
if "one" in globals():
    out["gemms_per_s"] = rate(one, task["shapes"])
    out["seconds"] = [float(t) for t in globals().get("times", lambda shapes: map(one, shapes))(task["shapes"])]
if "listed" in globals():
    out["gemms_per_s_in_lists"] = listed(task["shapes"][:100])
if "answer" in globals():
    out["runs"] = [answered(row) for row in task["runs"]]
    known = [row for row, found in zip(task["runs"], out["runs"]) if found]
    known = [row for row in known if row["phase"] == "serve"] or known
    # no question twice: a peer may keep its answers
    out["models_per_s"] = rate(answer, [{**row, "seq": row["seq"] + i} for i in range(1, 60) for row in known])
print("RESULT " + json.dumps(out))
"""

NVIDIA_MATMUL = """
from nvMatmulHeuristics.nvMatmulHeuristics import *
backend, gpu = NvMatmulHeuristicsTarget.CUTLASS3, NvMatmulHeuristicsNvidiaGpu.H100_SXM
source = NvMatmulHeuristicsInterfaceEx(backend=backend, gpu=gpu)
def one(shape):
    m, n, k = shape
    # of 3 targets x 3 layouts x 2 formats x (m, n) in either order, the way that errs least on these shapes
    problem = source.makeNvMatmulHeuristicsProblem(n, m, k, NvMatmulHeuristicsMatmulLayout.NN_ROW_MAJOR)
    found = source.get(problem, 1, "HSH")
    return found[0]["runtime"] if found else float("nan")
"""

AICONFIGURATOR = """
import functools, logging, pathlib, shutil, tempfile, warnings
warnings.filterwarnings("ignore"); logging.disable(logging.CRITICAL)
import aiconfigurator_core
from aiconfigurator.cli.api import cli_estimate
from aiconfigurator.sdk import perf_database
from aiconfigurator_core.sdk import common, engine
from aiconfigurator_core.sdk.operations.gemm import GEMM
from aiconfigurator_core.sdk.perf_database import get_database, get_latest_database_version
version = get_latest_database_version("h100_sxm", "trtllm")
def gemm(n, k):
    return GEMM("g", 1.0, n, k, common.GEMMQuantMode.bfloat16)
whole = get_database("h100_sxm", "trtllm", version)
def one(shape, base=whole):
    m, n, k = shape
    return float(gemm(n, k)._engine_query(base, x=m)) * 1e-3
def listed(shapes):
    # many shapes of one m in a call: its engine takes a list of operators
    handle = engine._probe_handle_for(whole, None)
    how = dict(is_context=True, batch_size=1, s=1, prefix=0, imbalance_correction_scale=1.0)
    def some(m):
        return handle.evaluate_ops_json(engine.build_ops_json([gemm(n, k) for _, n, k in shapes]), x=m, **how)
    return len(shapes) * rate(some, [16, 64, 1000])
def times(shapes):
    # its own table, without the rows that are asked for
    import numpy as np, pyarrow.parquet as parquet
    root = pathlib.Path(aiconfigurator_core.__file__).parent / "systems"
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "systems"
        shutil.copytree(root / "data/h100_sxm", copy / "data/h100_sxm")
        for spec in root.glob("*.yaml"):
            shutil.copy(spec, copy)
        file = copy / "data/h100_sxm/gemm/trtllm" / version / "gemm_perf.parquet"
        table = parquet.read_table(file)
        key = np.array(table["n"]).astype(np.int64) << 32 | np.array(table["k"])
        asked = np.array([n << 32 | k for _, n, k in shapes])
        parquet.write_table(table.filter(~np.isin(key, asked)), file)
        base = get_database("h100_sxm", "trtllm", version, systems_paths=[str(copy)], shared_layer=False)
        def known(shape):
            try:
                return one(shape, base)
            except Exception:  # nothing measured near it
                return float("nan")
        return [known(s) for s in shapes]
# each estimate would read its YAML files again
for name in ("get_latest_database_version", "get_database_view"):
    setattr(perf_database, name, functools.cache(getattr(perf_database, name)))
def answer(row):
    folder = pathlib.Path("configs") / row["model"]
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(row["config"]))
    weights = {"bf16": "bfloat16", "fp16": "bfloat16"}.get(row["weights"], row["weights"])
    found = cli_estimate(
        str(folder), row["gpu"].removesuffix("_80gb"), mode="agg" if row["phase"] == "serve" else "static",
        backend_name=row["engine"], isl=row["seq"], osl=max(row["new"], 2), batch_size=row["batch"],
        tp_size=row["devices"], gemm_quant_mode=weights, kvcache_quant_mode=row["cache"] or None,
    )
    return found.ttft * 1e-3, found.tpot * 1e-3
"""

GENZ = """
import warnings
warnings.filterwarnings("ignore")
from GenZ import decode_moddeling, prefill_moddeling
from GenZ.LLM_inference.utils import get_inference_system
from GenZ.Models.default_models import ModelConfig
from GenZ.operators import GEMM
from GenZ.unit import Unit
unit, system = Unit(), get_inference_system("H100_GPU", "bf16")
def one(shape):
    m, n, k = shape
    return GEMM(["g", 1, n, m, k, 0], (1.0, 1.0, 1.0)).get_roofline(system, unit)["Latency (msec)"] * 1e-3
def answer(row):
    c = row["config"]
    model = ModelConfig(model=row["model"], num_ffi=2, num_decoder_layers=c["num_hidden_layers"], **c)
    gpu = {"h100_sxm": "H100_GPU", "a100_sxm_80gb": "A100_80GB_GPU"}[row["gpu"]]
    how = dict(model=model, batch_size=row["batch"], system_name=gpu, tensor_parallel=row["devices"])
    how["bits"] = {"fp16": "bf16"}.get(row["weights"], row["weights"])
    step = decode_moddeling(input_tokens=row["seq"] + row["new"] // 2, Bb=1, **how)["Latency"] * 1e-3
    if row["phase"] in ("serve", "decode"):
        return 0.0, step
    return prefill_moddeling(input_tokens=row["seq"], **how)["Latency"] * 1e-3, step
"""

RIDGEPOINT = """
from ridgepoint import _core
def answer(row):
    assert row["batch"] == 1
    gpus = {"h100_sxm": "h100-80gb", "a100_sxm_80gb": "a100-80gb"}
    gpus |= {"rtx_4090": "rtx4090-24gb", "rtx_3090": "rtx3090-24gb"}
    c = row["config"]
    shape = ("x", c["num_hidden_layers"], c["num_hidden_layers"], c["hidden_size"], row["params"], row["params"])
    heads = (c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"], 0, 0)
    kind = "mha" if heads[1] == heads[2] else "gqa"
    ctx = row["seq"] + row["new"]
    args = (gpus[row["gpu"]], row["devices"], "vllm", "fp16", "fp16", ctx, row["seq"], True)
    found = json.loads(_core.fit_shape(*shape, kind, *heads, *args))["speed"]
    return found["ttft_s"]["best"], 1.0 / found["decode_tok_s"]["best"]
"""

SERVCALC = """
from servcalc import Workload, estimate
from servcalc.profiles import hf, vllm
GPUS = {"h100_sxm": "H100 80GB", "h200_sxm": "H200", "b200_sxm": "B200", "a100_sxm_80gb": "A100 80GB"}
GPUS |= {"rtx_4090": "RTX 4090", "rtx_3090": "RTX 3090"}
def answer(row):
    assert row["devices"] == 1
    how = {} if row["phase"] == "serve" else {"chunked": False, "batching": "static"}
    how["quant"] = {"bf16": None, "fp16": None, "fp8_block": "fp8"}.get(row["weights"], row["weights"])
    profile = hf() if row["engine"] == "hf" else vllm(kv_bits=8 if row["cache"] else 16, **how)
    load = Workload(row["seq"], max(row["new"], 2), (row["batch"],))
    (point,) = estimate(row["config"], GPUS[row["gpu"]], workload=load, profile=profile).points
    assert point.feasible
    return point.ttft_ms.mid * 1e-3, point.itl_ms.mid * 1e-3
"""

LLM_FLOPS = """
from llmflops import estimate, throughput
from llmflops.config import ModelConfig
GPUS = {"h100_sxm": "h100", "h200_sxm": "h200", "a100_sxm_80gb": "a100", "rtx_4090": "4090", "rtx_3090": "3090"}
def answer(row):
    shape = {name: v for name, v in row["config"].items() if name in ModelConfig.__annotations__}
    model = ModelConfig(name=row["model"], num_layers=row["config"]["num_hidden_layers"], **shape)
    how = dict(gpu=GPUS[row["gpu"]], precision=row["weights"].removesuffix("_block"), sequence_length=row["seq"])
    how |= dict(parallelism={"tensor_parallel": row["devices"]}, kv_cache_precision=row["cache"] or "bf16")
    first = estimate(model, row["batch"], causal=True, include_backward=False, **how)["latency"]
    step = throughput(model, output_tokens=max(row["new"], 1), max_batch=row["batch"], **how)
    return first, step["decode_step_ms"] * 1e-3
"""

PEERS = {
    "aiconfigurator": AICONFIGURATOR,
    "nvidia-matmul-heuristics": NVIDIA_MATMUL,
    "genz-llm": GENZ,
    "ridgepoint": RIDGEPOINT,
    "servcalc": SERVCALC,
    "llm-flops": LLM_FLOPS,
}
MODELS = Path(simulator.__file__).parent / "models"

Split = namedtuple("Split", "fit test fit_s test_s")
"""Measured shapes and their times: to fit on, and to be judged on, whose (n, k) the first lack."""


def split(seed: int = 0, most: int = 5000) -> Split:
    """70 and 30 % of the (n, k) pairs of the measured table."""
    records = load_measurements(TABLE, "bf16")
    shapes = np.stack(
        [np.asarray(getattr(records, name), dtype=np.int64) for name in ("m", "n", "k")], axis=1
    )
    seconds = np.asarray(records.seconds, dtype=np.float64)
    pairs, which = np.unique(shapes[:, 1:], axis=0, return_inverse=True)
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(pairs), dtype=bool)
    chosen[rng.permutation(len(pairs))[: round(0.7 * len(pairs))]] = True
    fit = chosen[which.reshape(-1)]
    test = rng.permutation(np.flatnonzero(~fit))[:most]
    return Split(shapes[fit], shapes[test], seconds[fit], seconds[test])


def conditions(row: Mapping[str, str], phase: str, batch: str) -> dict[str, Any]:
    """What a peer is told of a published row."""
    config = {
        k: v
        for k, v in json.loads((MODELS / f"{row['model']}.json").read_text()).items()
        if k[0] != "_"
    }
    config["architectures"] = [
        {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[config["model_type"]]
    ]
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    out = {
        "model": row["model"],
        "config": config,
        "params": simulator.load_model(row["model"]).parameters,
    }
    out |= {
        "gpu": row["hardware"],
        "weights": row["weight_dtype"] or row["dtype"],
        "cache": row.get("kv_dtype", ""),
    }
    numbers = {
        "batch": batch,
        "seq": row["seq"],
        "new": row["new_tokens"],
        "devices": row["devices"],
    }
    out |= {name: int(value or 0) for name, value in numbers.items()}
    return out | {"engine": row["engine"].partition("@")[0], "phase": phase}


def published_runs() -> Iterator[tuple[dict[str, Any], float, float]]:
    """Conditions of published runs of dense models, their times, s, and prunesim's."""
    held, seen = dict(zip(groups(), held_out_models(), strict=True)), Counter[tuple[str, ...]]()
    for row in published("serving"):
        key = tuple(
            row[name] for name in ("engine", "version", "model", "hardware", "weight_dtype")
        )
        if row["left_out"] or key not in held or held[key].experts or serving_workload(row) is None:
            continue
        measured, predicted = held[key].group.tpot_s[seen[key]], held[key].tpot_s[seen[key]]
        assert measured == float(row["tpot_s"])
        seen[key] += 1
        yield conditions(row, "serve", row["concurrency"]), float(measured), float(predicted)
    rows = [row for row in published("dense") if not row["left_out"]]
    for row, found in zip(rows, compare_dense(), strict=True):
        if found.split == "judge":
            yield conditions(row, row["phase"], row["batch"]), found.measured, found.predicted


def run_errors(seconds: Any, runs: list[Any]) -> dict[str, tuple[float, ...]]:
    """Number of answered runs, and median errors, %, of the answers and of prunesim on the same
    runs, for serving runs and for other runs."""
    _, measured, own = zip(*runs, strict=True)
    error = 100.0 * np.abs(np.array([seconds, own], dtype=np.float64) / measured - 1.0)
    serving = np.array([row["phase"] == "serve" for row, *_ in runs])
    known = {
        kind: error[:, np.isfinite(error[0]) & (serving == (kind == "serving"))]
        for kind in ("serving", "other")
    }
    return {
        kind: (e.shape[1], *(np.median(e, axis=1) if e.size else ())) for kind, e in known.items()
    }


class Silent(Exception):
    """A peer that cannot be installed or does not answer, and why."""


def program(words: list[str], limit_s: float, what: str, **options: Any) -> str:
    """Standard output of a peer's program."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=limit_s, check=False, **options
        )
    except subprocess.TimeoutExpired:
        raise Silent(f"{what}: not within {limit_s:.0f} s") from None
    if done.returncode and "RESULT " not in done.stdout:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Silent(f"{what} failed: {lines[-1][:160] if lines else done.returncode}")
    return done.stdout


def install(package: str, folder: Path) -> str:
    """The interpreter of a peer's environment."""
    python = folder / package / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / package)], check=True)
    quiet = ("--quiet", "--disable-pip-version-check")
    program([str(python), "-m", "pip", "install", *quiet, package], INSTALL_S, "pip")
    return str(python)


def ask(python: str, package: str, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a peer answers."""
    (folder / "task.json").write_text(json.dumps(task))
    out = program(
        [python, "-c", PEERS[package] + HARNESS, str(folder / "task.json")],
        RUN_S,
        "answer",
        cwd=folder,
    )
    return json.loads(out[out.rindex("RESULT ") + 7 :])


def peer(package: str, folder: Path, data: Split, runs: list[Any]) -> dict[str, Any] | str:
    """The numbers of a peer, or why there are none; its error also with the one scale that suits it
    best."""
    at = np.random.default_rng(2).permutation(len(data.fit))[:1000]
    task = {
        "shapes": [*data.test.tolist(), *data.fit[at].tolist()],
        "runs": [row for row, *_ in runs],
    }
    task["package"] = package
    try:
        found = ask(install(package, folder), package, task, folder)
    except Silent as reason:
        return str(reason)
    if "runs" in found:
        found["runs"] = run_errors(found["runs"], runs)
    if "seconds" in found:
        seconds = np.array(found.pop("seconds"))
        test, fit = seconds[: len(data.test)], seconds[len(data.test) :]
        best = min(
            10.0 ** np.linspace(-2, 1, 301), key=lambda scale: mape(fit * scale, data.fit_s[at])
        )
        found |= {"answered": float(np.isfinite(test).mean()), "mape": mape(test, data.test_s)}
        found["mape_one_scale"] = mape(test * best, data.test_s)
    return found


def prunesim(data: Split, runs: list[Any], repeat: int = 5) -> dict[str, Any]:
    """The same numbers of this package: with residual and interval of a profile fitted on 4,000
    rows of the 70 %."""
    hw = simulator.load_hardware(DEVICE)
    out: dict[str, Any] = {}
    rng = np.random.default_rng(1)
    at = rng.permutation(len(data.fit))[:4000]
    section = fit_gemm(
        products(*data.fit[at].T, data.fit_s[at], Machine.of(hw, "bf16")), hw
    ).section
    profile = replace(hw, sections=MappingProxyType({**hw.sections, ("gemm", "bf16"): section}))
    # weights the tables rotate
    rotated = rotated_copies(2.0 * data.test[:, 1] * data.test[:, 2], hw.l2_bytes)
    predicted = simulator.gemm_time(
        *data.test.T, profile, options=simulator.GemmOptions(copies=rotated)
    ).seconds
    out["mape"] = mape(predicted, data.test_s)
    roofline = simulator.gemm_time(*data.test.T, profile).roofline_s
    out["mape_roofline"] = mape(roofline, data.test_s)
    m, n, k = (np.tile(c, 20) for c in data.test.T)
    took_s = [
        timed(lambda: simulator.gemm_time(m, n, k, profile), time.process_time)
        for _ in range(repeat)
    ]
    out["gemms_per_s"] = len(m) / min(took_s)
    took_s = [timed(lambda: compare_serving(experts=False), time.process_time) for _ in range(3)]
    out["models_per_s"] = len(compare_serving(experts=False)) / min(took_s)
    out["runs"] = run_errors([own for *_, own in runs], runs)
    batches, seqs = tuple(2**i for i in range(8)), tuple(2**i for i in range(7, 15))
    grid = Grid(("llama-3.1-8b",), (DEVICE,), (0.25, 0.5), ("prefill", "decode"), batches, seqs)
    some = list(grid.pieces())
    piece_results(some[0], grid.hardware, {})
    took = timed(lambda: [piece_results(p, grid.hardware, {}) for p in some], time.process_time)
    out["models_per_s_in_a_sweep"] = grid.size / took
    return out


def mape(predicted: Any, measured: Any) -> float:
    """Mean absolute error, in percent; NaN where something was not predicted is left out."""
    error = np.abs(np.asarray(predicted, dtype=np.float64) / measured - 1.0)
    return float(100.0 * np.nanmean(error))


def timed(call: Any, clock: Any = time.perf_counter) -> float:
    """Time of a call, s."""
    began = clock()
    call()
    return float(clock() - began)


def main() -> None:
    """Run all and print a table and a JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the environments here")
    parser.add_argument(
        "--peer", action="append", choices=PEERS, help="only this one; may be repeated"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = split()
        runs = list(published_runs())
        results: dict[str, Any] = {"prunesim": prunesim(data, runs)}
        results |= {package: peer(package, folder, data, runs) for package in options.peer or PEERS}
    show(results, len(data.test))
    print(json.dumps(results))


def show(results: dict[str, Any], rows: int) -> None:
    """The tables of the page."""
    own, found = (
        results["prunesim"],
        {name: r for name, r in results.items() if not isinstance(r, str)},
    )
    print(
        f"{rows} GEMMs of {TABLE} with unseen (n, k); the datasheet roofline errs by"
        f" {own['mape_roofline']:.1f} %\n"
    )
    print("| | GEMMs/s | answered | error, % |\n| --- |" + " ---: |" * 3)
    for name, r in found.items():
        if "mape" in r:
            lists = (
                f" ({r['gemms_per_s_in_lists']:,.0f} in lists)"
                if "gemms_per_s_in_lists" in r
                else ""
            )
            scaled = f" ({r['mape_one_scale']:.1f})" if "mape_one_scale" in r else ""
            share = f"{r.get('answered', 1.0):.0%}"
            print(
                f"| {name} | {r['gemms_per_s']:,.0f}{lists} | {share} | {r['mape']:.1f}{scaled} |"
            )
    print(
        "\n| | estimates/s | serving runs | error, % | others | error, % |\n| --- |" + " ---: |" * 5
    )
    for name, r in found.items():
        if "runs" in r:
            rate = f"{r['models_per_s']:,.0f}"
            if "models_per_s_in_a_sweep" in r:
                rate += f" ({r['models_per_s_in_a_sweep']:,.0f} in a sweep)"
            cells = [
                f"{n} | {e[0]:.1f} ({e[1]:.1f})" if n else "0 | " for n, *e in r["runs"].values()
            ]
            print(
                f"| {' '.join([name, *r.get('version', '').split()])} | {rate} |"
                f" {' | '.join(cells)} |"
            )
    print()
    print(
        "".join(
            f"{name}: {reason}\n" for name, reason in results.items() if isinstance(reason, str)
        )
    )


if __name__ == "__main__":
    main()
