"""Peers beside prunesim in one run on one machine: ``python tests/benchmarks/peers.py``.

Each peer is installed from PyPI into a virtual environment of its own under a temporary folder (``--folder`` keeps it) and asked, by the
fastest way that was found, for the time of GEMMs and of a whole model. Printed: GEMMs and whole-model estimates a second of CPU time (so
a busy machine slows nobody more than another), wall time of a fresh process from import to first answer, and the mean error on the same
measured shapes, whose (n, k) neither prunesim's fit nor aiconfigurator's table has seen. A peer that cannot be installed or does not answer
is reported as such, with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
source = NvMatmulHeuristicsInterfaceEx(backend=NvMatmulHeuristicsTarget.CUTLASS3, gpu=NvMatmulHeuristicsNvidiaGpu.H100_SXM)
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

LLM_ANALYSIS = """
import logging
logging.disable(logging.CRITICAL)
from llm_analysis.analysis import LLMAnalysis
from llm_analysis.config import ModelConfig, get_dtype_config_by_name, get_gpu_config_by_name
shape = ModelConfig(name="llama", num_layers=32, n_head=32, hidden_dim=4096, vocab_size=128256, max_seq_len=8192, num_key_value_heads=8,
                    ffn_embed_dim=16384)  # it takes only multiples of the hidden size
gpu, kind = get_gpu_config_by_name("a100-sxm-80gb"), get_dtype_config_by_name("w16a16e16")
source = LLMAnalysis(shape, gpu, kind, flops_efficiency=1, hbm_memory_efficiency=1)
def model(batch, seq):
    return source.inference(batch_size_per_gpu=batch, seq_len=seq, num_tokens_to_generate=1)
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


@dataclass(frozen=True)
class Peer:
    """A package, what it depends on beyond what it says, and how it is asked."""

    package: str
    code: str
    extra: tuple[str, ...] = ()


PEERS = (
    Peer("aiconfigurator", AICONFIGURATOR),
    Peer("nvidia-matmul-heuristics", NVIDIA_MATMUL),
    Peer("genz-llm", GENZ),
    Peer("llm-analysis", LLM_ANALYSIS),
    Peer("ridgepoint", RIDGEPOINT),
)


@dataclass(frozen=True)
class Split:
    """Measured shapes: those to fit on, and those to be judged on, whose (n, k) the first lack."""

    fit: Any
    test: Any
    fit_s: Any
    test_s: Any


def split(seed: int = 0, most: int = 5000) -> Split:
    """70 and 30 % of the (n, k) pairs of the measured table."""
    from calibration.measurements import load_measurements

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


def install(peer: Peer, folder: Path) -> Path | str:
    """The interpreter of a peer's environment, or why there is none."""
    home = folder / peer.package
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    try:
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            peer.package,
            *peer.extra,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        return f"not installed within {INSTALL_S:.0f} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return f"pip failed: {lines[-1][:160] if lines else done.returncode}"
    return python


def ask(python: Path, peer: Peer, task: dict[str, Any], folder: Path) -> tuple[dict[str, Any] | str, float]:
    """What a peer answers, or why it does not, and the wall time of its process."""
    (folder / "task.json").write_text(json.dumps(task))
    began = time.perf_counter()
    try:
        command = [str(python), "-c", peer.code + HARNESS, str(folder / "task.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=folder)
    except subprocess.TimeoutExpired:
        return f"no answer within {RUN_S:.0f} s", RUN_S
    wall = time.perf_counter() - began
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        error = [line for line in done.stderr.splitlines() if line.strip()]
        return f"failed: {error[-1][:160] if error else done.returncode}", wall
    found: dict[str, Any] = json.loads(lines[-1][7:])
    return found, wall


def prunesim(data: Split, repeat: int = 5) -> dict[str, Any]:
    """The same numbers of this package: rates with residual and interval of a profile fitted on 4,000 rows of the 70 %."""
    from dataclasses import replace
    from types import MappingProxyType

    import simulator
    from calibration.fit.core import machine_of, shapes
    from calibration.fit.gemm import fit_gemm
    from simulator.predict.grid import Grid
    from simulator.predict.sweep import piece_columns, pieces

    hw = simulator.load_hardware(DEVICE)
    out: dict[str, Any] = {}
    rng = np.random.default_rng(1)
    for rows in (400, 4000):
        at = rng.permutation(len(data.fit))[:rows]
        began = time.perf_counter()
        section = fit_gemm(shapes(*data.fit[at].T, data.fit_s[at], machine_of(hw, "bf16")), hw).section
        out[f"fit_s_{rows}"] = time.perf_counter() - began
        profile = replace(hw, sections=MappingProxyType({**hw.sections, ("gemm", "bf16"): section}))
        predicted = simulator.gemm_time(*data.test.T, profile, cold=False, copies=copies(data.test, profile)).seconds
        out[f"mape_{rows}"] = mape(predicted, data.test_s)
    roofline = simulator.gemm_time(*data.test.T, profile).roofline_s
    out["mape_roofline"] = mape(roofline, data.test_s)
    m, n, k = (np.tile(c, 20) for c in data.test.T)
    out["gemms_per_s"] = max(
        len(m) / timed(lambda: simulator.gemm_time(m, n, k, profile), time.process_time) for _ in range(repeat)
    )
    model = simulator.load_model("llama-3.1-8b")
    lengths = iter(range(128, 10**6))

    def estimate() -> float:
        return simulator.cost(simulator.lower(model, phase="prefill", batch=1, seq=next(lengths)), profile).total_s

    estimate()
    out["models_per_s"] = 200 / timed(lambda: [estimate() for _ in range(200)], time.process_time)
    batches, seqs = tuple(2**i for i in range(8)), tuple(2**i for i in range(7, 15))
    grid = Grid(("llama-3.1-8b",), (DEVICE,), (0.25, 0.5), ("prefill", "decode"), batches, seqs)
    some = list(pieces(grid))
    piece_columns(grid, some[0], {})
    out["models_per_s_in_a_sweep"] = grid.size / timed(
        lambda: [piece_columns(grid, p, {}) for p in some], time.process_time
    )
    code = f"import simulator; simulator.gemm_time(2048, 4096, 4096, simulator.load_hardware({DEVICE!r}))"
    out["first_s"] = float(
        np.median([timed(lambda: subprocess.run([sys.executable, "-c", code], check=True)) for _ in range(3)])
    )
    return out


def copies(shapes: Any, hw: Any) -> Any:
    """Weights the published tables rotate (DESIGN section 10)."""
    from calibration.records.screening import rotated_copies

    return rotated_copies(2.0 * shapes[:, 1] * shapes[:, 2], hw.l2_bytes)


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
    parser.add_argument("--peer", action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = split()
        results: dict[str, Any] = {"prunesim": prunesim(data)}
        scale_at = np.random.default_rng(2).permutation(len(data.fit))[:1000]
        for peer in PEERS:
            if options.peer and peer.package not in options.peer:
                continue
            python = install(peer, folder)
            if isinstance(python, str):
                results[peer.package] = python
                continue
            first = sorted(ask(python, peer, {"first": True}, folder)[1] for _ in range(3))[1]
            shapes = [*data.test.tolist(), *data.fit[scale_at].tolist()]
            found, _ = ask(python, peer, {"first": False, "shapes": shapes}, folder)
            if isinstance(found, dict):
                found["first_s"] = first
                if "seconds" in found:
                    seconds = np.array(found.pop("seconds"))
                    test, fit = seconds[: len(data.test)], seconds[len(data.test) :]
                    found["answered"] = float(np.isfinite(test).mean())
                    found["mape"] = mape(test, data.test_s)
                    scales = 10.0 ** np.linspace(-2, 1, 301)
                    best = min(scales, key=lambda s: mape(fit * s, data.fit_s[scale_at]))
                    found["mape_one_scale"] = mape(test * best, data.test_s)
            results[peer.package] = found
    show(results, len(data.test))
    print(json.dumps(results))


def show(results: dict[str, Any], rows: int) -> None:
    """A table of what was found."""
    own = results["prunesim"]
    print(f"{rows} measured shapes of {TABLE} with unseen (n, k); datasheet roofline {own['mape_roofline']:.1f} %")
    print(f"{'':26}{'GEMMs/s':>12}{'models/s':>12}{'first answer':>14}{'MAPE':>9}")
    for name, r in results.items():
        if isinstance(r, str):
            print(f"{name:26}{r}")
            continue
        error = r.get("mape_4000", r.get("mape"))
        cells = [
            f"{r['gemms_per_s']:,.0f}" if "gemms_per_s" in r else "-",
            f"{r['models_per_s']:,.1f}" if "models_per_s" in r else "-",
            f"{r['first_s']:.2f} s",
            f"{error:.1f} %" if error is not None else "-",
        ]
        print(f"{name:26}{cells[0]:>12}{cells[1]:>12}{cells[2]:>14}{cells[3]:>9}")
        for key, text in (
            ("gemms_per_s_in_lists", "GEMMs/s in lists"),
            ("models_per_s_in_a_sweep", "models/s in a sweep"),
            ("mape_one_scale", "MAPE, one fitted scale"),
            ("answered", "share of the shapes answered"),
        ):
            if key in r:
                print(f"{'':8}{text}: {r[key]:,.2f}")
        if "gemms_per_s" in r and name != "prunesim":
            print(f"{'':8}prunesim is {own['gemms_per_s'] / r['gemms_per_s']:,.0f} times as fast")


if __name__ == "__main__":
    main()
