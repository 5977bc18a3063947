"""Peers beside prunesim in one run on one machine: ``python tests/benchmarks/peers.py``.

Each peer is installed from PyPI into a virtual environment of its own under a temporary folder (``--folder`` keeps it)
and asked, by the fastest way that was found, for the time of GEMMs and of a whole model. Printed: GEMMs and whole-model
estimates a second of CPU time (so a busy machine slows nobody more than another), wall time of a fresh process from
import to first answer, and the mean error on the same measured shapes, whose (n, k) neither prunesim's fit nor
aiconfigurator's table has seen. A peer that cannot be installed or does not answer is reported, with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import simulator
from calibration.fit.gemm import fit_gemm, products
from calibration.measurements import load_measurements
from calibration.records.screening import rotated_copies
from simulator.operators.base import Machine
from simulator.prediction.grid import Grid
from simulator.prediction.sweep import piece_results

TABLE, DEVICE = "h100_sxm/gemm/trtllm", "h100_sxm"
INSTALL_S, RUN_S = 420.0, 120.0

HARNESS = """
import json, statistics, sys, time
task = json.load(open(sys.argv[1]))
out = {}
def rate(call, items, most_s=4.0):
    call(items[0])
    began, done = time.process_time(), 0
    while time.process_time() - began < most_s and done < 20000:
        call(items[done % len(items)])
        done += 1
    return done / (time.process_time() - began)
if task["first"]:
    first()
else:
    for name, how in WAYS.items():
        out[name] = how(task)
    if "times" in globals():
        out["seconds"] = [float(t) for t in times(task["shapes"])]
    if "model" in globals():
        out["models_per_s"] = rate(lambda shape: model(*shape), [(1, 128 + i) for i in range(64)])
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
def first():
    one((2048, 4096, 4096))
def times(shapes):
    return [one(s) for s in shapes]
WAYS = {"gemms_per_s": lambda task: rate(one, task["shapes"])}
"""

AICONFIGURATOR = """
import logging, pathlib, shutil, tempfile, warnings
warnings.filterwarnings("ignore"); logging.disable(logging.CRITICAL)
import aiconfigurator_core
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
def first():
    one((2048, 4096, 4096))
def listed(task, many=100):
    # many shapes of one m in a call: its engine takes a list of operators
    shapes = task["shapes"][:many]
    handle = engine._probe_handle_for(whole, None)
    how = dict(is_context=True, batch_size=1, s=1, prefix=0, imbalance_correction_scale=1.0)
    def some(m):
        return handle.evaluate_ops_json(engine.build_ops_json([gemm(n, k) for _, n, k in shapes]), x=m, **how)
    return many * rate(some, [16, 64, 1000])
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
def model(batch, seq):
    from aiconfigurator.cli.api import cli_estimate
    how = dict(mode="static", backend_name="trtllm", osl=2)
    return cli_estimate("meta-llama/Meta-Llama-3.1-8B", "h100_sxm", isl=seq, batch_size=batch, **how).ttft
WAYS = {"gemms_per_s": lambda task: rate(one, task["shapes"]), "gemms_per_s_in_lists": listed}
"""

GENZ = """
import warnings
warnings.filterwarnings("ignore")
from GenZ import prefill_moddeling
def model(batch, seq):
    how = dict(system_name="H100_GPU", bits="bf16")
    return prefill_moddeling(model="meta-llama/Llama-3.1-8B", batch_size=batch, input_tokens=seq, **how)["Latency"]
def first():
    model(1, 2048)
WAYS = {}
"""

RIDGEPOINT = """
import ridgepoint
names = ("llama-3-8b", "llama-2-7b")
def model(batch, seq):
    for name in names:
        try:
            return ridgepoint.fit(name, "h100-80gb", prompt=seq, as_json=True)
        except ValueError as error:
            last = error
    raise last
def first():
    model(1, 2048)
WAYS = {}
"""


PEERS = {
    "aiconfigurator": AICONFIGURATOR,
    "nvidia-matmul-heuristics": NVIDIA_MATMUL,
    "genz-llm": GENZ,
    "ridgepoint": RIDGEPOINT,
}

Split = namedtuple("Split", "fit test fit_s test_s")
"""Measured shapes and their times: to fit on, and to be judged on, whose (n, k) the first lack."""


def split(seed: int = 0, most: int = 5000) -> Split:
    """70 and 30 % of the (n, k) pairs of the measured table."""
    records = load_measurements(TABLE, "bf16")
    shapes = np.stack([np.asarray(getattr(records, name), dtype=np.int64) for name in ("m", "n", "k")], axis=1)
    seconds = np.asarray(records.seconds, dtype=np.float64)
    pairs, which = np.unique(shapes[:, 1:], axis=0, return_inverse=True)
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(pairs), dtype=bool)
    chosen[rng.permutation(len(pairs))[: round(0.7 * len(pairs))]] = True
    fit = chosen[which.reshape(-1)]
    test = rng.permutation(np.flatnonzero(~fit))[:most]
    return Split(shapes[fit], shapes[test], seconds[fit], seconds[test])


class Silent(Exception):
    """A peer that cannot be installed or does not answer, and why."""


def program(words: list[str], limit_s: float, what: str, **options: Any) -> str:
    """Standard output of a peer's program."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False, **options)
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


def ask(python: str, package: str, task: dict[str, Any], folder: Path) -> tuple[dict[str, Any], float]:
    """What a peer answers, and the wall time of its process."""
    (folder / "task.json").write_text(json.dumps(task))
    began = time.perf_counter()
    words = [python, "-c", PEERS[package] + HARNESS, str(folder / "task.json")]
    out = program(words, RUN_S, "answer", cwd=folder)
    wall = time.perf_counter() - began
    return json.loads(out[out.rindex("RESULT ") + 7 :]), wall


def peer(package: str, folder: Path, data: Split) -> dict[str, Any] | str:
    """The numbers of a peer, or why there are none; its error also with the one scale that suits it best."""
    try:
        python = install(package, folder)
        first = sorted(ask(python, package, {"first": True}, folder)[1] for _ in range(3))[1]
        at = np.random.default_rng(2).permutation(len(data.fit))[:1000]
        shapes = [*data.test.tolist(), *data.fit[at].tolist()]
        found, _ = ask(python, package, {"first": False, "shapes": shapes}, folder)
    except Silent as reason:
        return str(reason)
    found["first_s"] = first
    if "seconds" in found:
        seconds = np.array(found.pop("seconds"))
        test, fit = seconds[: len(data.test)], seconds[len(data.test) :]
        best = min(10.0 ** np.linspace(-2, 1, 301), key=lambda scale: mape(fit * scale, data.fit_s[at]))
        found |= {"answered": float(np.isfinite(test).mean()), "mape": mape(test, data.test_s)}
        found["mape_one_scale"] = mape(test * best, data.test_s)
    return found


def prunesim(data: Split, repeat: int = 5) -> dict[str, Any]:
    """The same numbers of this package: with residual and interval of a profile fitted on 4,000 rows of the 70 %."""
    hw = simulator.load_hardware(DEVICE)
    out: dict[str, Any] = {}
    rng = np.random.default_rng(1)
    for rows in (400, 4000):
        at = rng.permutation(len(data.fit))[:rows]
        began = time.perf_counter()
        section = fit_gemm(products(*data.fit[at].T, data.fit_s[at], Machine.of(hw, "bf16")), hw).section
        out[f"fit_s_{rows}"] = time.perf_counter() - began
        profile = replace(hw, sections=MappingProxyType({**hw.sections, ("gemm", "bf16"): section}))
        rotated = rotated_copies(2.0 * data.test[:, 1] * data.test[:, 2], hw.l2_bytes)  # weights the tables rotate
        predicted = simulator.gemm_time(*data.test.T, profile, options=simulator.GemmOptions(copies=rotated)).seconds
        out[f"mape_{rows}"] = mape(predicted, data.test_s)
    roofline = simulator.gemm_time(*data.test.T, profile).roofline_s
    out["mape_roofline"] = mape(roofline, data.test_s)
    m, n, k = (np.tile(c, 20) for c in data.test.T)
    took_s = [timed(lambda: simulator.gemm_time(m, n, k, profile), time.process_time) for _ in range(repeat)]
    out["gemms_per_s"] = len(m) / min(took_s)
    model = simulator.load_model("llama-3.1-8b")

    def estimate(seqs: range) -> None:
        for seq in seqs:
            simulator.workload_time(simulator.lower(model, phase="prefill", batch=1, seq=seq), profile)

    estimate(range(100, 101))
    out["models_per_s"] = 200 / timed(lambda: estimate(range(128, 328)), time.process_time)
    batches, seqs = tuple(2**i for i in range(8)), tuple(2**i for i in range(7, 15))
    grid = Grid(("llama-3.1-8b",), (DEVICE,), (0.25, 0.5), ("prefill", "decode"), batches, seqs)
    some = list(grid.pieces())
    piece_results(some[0], grid.hardware, {})
    took = timed(lambda: [piece_results(p, grid.hardware, {}) for p in some], time.process_time)
    out["models_per_s_in_a_sweep"] = grid.size / took
    code = f"import simulator; simulator.gemm_time(2048, 4096, 4096, simulator.load_hardware({DEVICE!r}))"
    first_s = [timed(lambda: subprocess.run([sys.executable, "-c", code], check=True)) for _ in range(3)]
    out["first_s"] = sorted(first_s)[1]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the environments here")
    parser.add_argument("--peer", action="append", choices=PEERS, help="only this one; may be repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = split()
        results: dict[str, Any] = {"prunesim": prunesim(data)}
        results |= {package: peer(package, folder, data) for package in options.peer or PEERS}
    show(results, len(data.test))
    print(json.dumps(results))


DETAILS = {
    "gemms_per_s_in_lists": "GEMMs/s in lists",
    "models_per_s_in_a_sweep": "models/s in a sweep",
    "mape_one_scale": "MAPE, one fitted scale",
    "answered": "share of the shapes answered",
}


def show(results: dict[str, Any], rows: int) -> None:
    """A table of what was found."""
    own = results["prunesim"]
    print(f"{rows} measured shapes of {TABLE} with unseen (n, k); datasheet roofline {own['mape_roofline']:.1f} %")
    print(f"{'':26}{'GEMMs/s':>12}{'models/s':>12}{'first, s':>12}{'MAPE, %':>12}")
    for name, r in results.items():
        if isinstance(r, str):
            print(f"{name:26}{r}")
            continue
        r = {**r, "mape": r.get("mape_4000", r.get("mape"))}
        columns = {"gemms_per_s": ">12,.0f", "models_per_s": ">12,.1f", "first_s": ">12.2f", "mape": ">12.1f"}
        print(f"{name:26}" + "".join(format(r[k], form) if r.get(k) else f"{'-':>12}" for k, form in columns.items()))
        for key, text in DETAILS.items():
            if key in r:
                print(f"{'':8}{text}: {r[key]:,.2f}")
        if "gemms_per_s" in r and name != "prunesim":
            print(f"{'':8}prunesim is {own['gemms_per_s'] / r['gemms_per_s']:,.0f} times as fast")


if __name__ == "__main__":
    main()
