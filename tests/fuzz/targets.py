"""The formats that are read, each as a target: how to make an input near a good one, how to read it, and what must hold of what was read.

A target's ``make`` gives the bytes (or text) of one input; ``read`` reads it and hands what it got to the next stage, which may refuse it
in one line as well. Whatever is neither a result nor an ``InputError`` is a bug.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import near_lines as lines
import near_page as page
import near_tables as tables
import numpy as np
from mutate import csv_text, edit_bytes, json_text, npz_bytes, yaml_text

import simulator
from simulator.hardware import library as hardware

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes
    ----------
    name : str
    file : str
        Name of the file an input is written to; empty where the input is a text on the command line.
    make : callable
        random.Random -> bytes of an input.
    read : callable
        Path -> anything; reads the file and uses what it got.
    commands : tuple of tuple of str
        Command lines that read the file, {} standing for its path.
    positions : bool
        Whether a refusal carries line and column.
    names_file : bool
        Whether a refusal carries the name of the file.
    """

    name: str
    file: str
    make: Callable[[random.Random], bytes]
    read: Callable[[Path], Any]
    commands: tuple[tuple[str, ...], ...] = ()
    positions: bool = False
    names_file: bool = True


# -- hardware profiles ------------------------------------------------------------------------------------------------------------

_M, _N, _K = (np.array(v) for v in ([1, 17, 300, 8192], [4096, 8810, 64, 16384], [4096, 64, 11008, 4096]))


def times(hw: Any) -> None:
    """Predictions of a profile that loaded: finite and above zero, in every format it has and in every kind of operator."""
    for dtype in hw.rates:
        t = simulator.gemm_time(_M, _N, _K, hw, dtype=dtype)
        for values in (t.seconds, t.lower, t.upper):
            assert np.isfinite(values).all(), (dtype, values)
            assert (values > 0).all(), (dtype, values)
        assert (t.lower <= t.upper).all()
    model = simulator.load_model("llama-3.2-1b")
    for phase, runtime in (("prefill", "cuda_graph"), ("decode", "eager")):
        for dtype in list(hw.rates)[:1]:
            dense = simulator.lower(model, phase=phase, batch=3, seq=130, dtype=dtype)
            s = simulator.speedup(dense, simulator.prune(dense, "width", 0.3), hw, runtime=runtime)
            found = (s.dense_s, s.pruned_s, s.speedup, s.lower, s.upper)
            assert np.isfinite(found).all(), found
            assert min(found) > 0.0, found


def _profile(path: Path) -> None:
    hardware._load.cache_clear()  # files of equal size within a tick of the clock look the same
    if path.stat().st_size % 8 == 0:
        for line in hardware.check_hardware(path):
            assert line.isprintable(), line
            assert line.startswith(f"{path}:"), line
    hw = hardware.load_hardware(path)
    times(hw)
    again = path.with_name("again.yaml")
    hardware.save_hardware(hw, again)  # what is read can be written and read again
    assert hardware.load_hardware(again).sm_count == hw.sm_count


@lru_cache
def _good_profile() -> str:
    """A shipped profile without its arrays, so that the file stands alone."""
    text = (ROOT / "hardware_profiles/rtx_4090.yaml").read_text(encoding="utf-8")
    out, skip = [], False
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        skip = line.strip() == "arrays:" or (skip and indent > 6)
        out += [] if skip else [line]
    return "\n".join(out).replace("name: rtx_4090", "name: mine").replace('aliases: ["', 'aliases: ["my ')


def _make_profile(rng: random.Random) -> bytes:
    small = (ROOT / "tests/bad_profiles/good.yaml").read_text(encoding="utf-8")
    small = small.replace("tensor_efficiency", "e_tc").replace(
        "t0_s: {value: 2.7e-06, std_error: 1e-08", "t0: {value: 2.7e-06, std_error: 1e-08"
    )
    text = _good_profile() if rng.random() < 0.1 else small
    return edit_bytes(text.encode(), rng) if rng.random() < 0.3 else yaml_text(text, rng)


# -- arrays beside a profile ------------------------------------------------------------------------------------------------------


@lru_cache
def good_arrays() -> Mapping[str, Any]:
    """Small arrays of every operator that has some, and exact shapes."""
    t, g = [[0, 1, -1], [11, -1, -1]], np.ones((2, 3, 3))
    g[:, :, 2] = 2
    g[1, 0] = (0.0, 1.0, 4.0)
    return {
        "gemm.bf16.terms": np.array(t),
        "gemm.bf16.grids": g,
        "gemm.bf16.values": np.linspace(-0.1, 0.1, 8).astype("f4"),
        "gemm.bf16.measured_m": np.array([1.0, 16.0, 17.0, 256.0, 4096.0]),
        "gemm.bf16.exact_m": np.array([1, 17]),
        "gemm.bf16.exact_n": np.array([4096, 8810]),
        "gemm.bf16.exact_k": np.array([4096, 64]),
        "gemm.bf16.exact_s": np.array([1e-4, 2e-5]),
        "gemm.bf16.exact_log_half": np.array([0.02, 0.1]),
        "attention_prefill.bf16.start": np.zeros(3),
        "attention_prefill.bf16.step": np.ones(3),
        "attention_prefill.bf16.values": np.zeros((3, 2, 2)),
        "attention_decode.bf16.start": np.zeros(3),
        "attention_decode.bf16.step": np.ones(3),
        "attention_decode.bf16.values": np.zeros((3, 2, 1)),
        "elementwise.bf16.start": np.array(14.0),
        "elementwise.bf16.values": np.zeros((7, 5)),
    }


OPERATORS = ("gemm", "attention_prefill", "attention_decode", "elementwise")


def profile_with(raw: bytes, file: str = "arrays.npz", operators: Iterable[str] = OPERATORS) -> str:
    """Text of a profile that names these bytes as the arrays of some operators."""
    text = (ROOT / "tests/bad_profiles/good.yaml").read_text(encoding="utf-8")
    head, provenance = (
        text[: text.index("calibrated:")],
        text[text.index("      provenance:") : text.index("      constants:")],
    )
    parts = ["calibrated:"]
    for operator in operators:
        names = [n.split(".")[2] for n in good_arrays() if n.startswith(f"{operator}.")]
        parts += [f"  {operator}:", "    bf16:", provenance.rstrip("\n"), "      constants: {}", "      arrays:"]
        parts += [
            f"        file: {file}",
            f'        sha256: "{hashlib.sha256(raw).hexdigest()}"',
            f"        names: [{', '.join(names)}]",
        ]
    return head + "\n".join(parts) + "\n"


def _arrays(path: Path) -> None:
    raw = path.read_bytes()
    operators = [o for o in OPERATORS if f"{o}.bf16.".encode() in raw] or ["gemm"]
    profile = path.with_name("with_arrays.yaml")
    profile.write_text(profile_with(raw, path.name, operators), encoding="utf-8")
    _profile(profile)


def _make_npz(rng: random.Random) -> bytes:
    operator = rng.choice(OPERATORS)
    return npz_bytes({name: array for name, array in good_arrays().items() if name.startswith(f"{operator}.")}, rng)


# -- grids of sweeps --------------------------------------------------------------------------------------------------------------

_GRID = """\
models: [llama-3.2-1b, llama-3.1-8b]
hardware: [h100_sxm, a100]
sparsities: {from: 0.1, to: 0.5, step: 0.2}
phases: [prefill, decode]
batches: [1, 8]
seqs: {from: 64, to: 256, times: 2}
families:
  - depth
  - width: {align: 64}
  - token: {}
dtypes:
  - bf16
  - {dtype: bf16, weight_dtype: int4, kv_dtype: fp8}
runtimes: [cuda_graph, eager]
devices: [1]
parallel: tensor
new_tokens: 16
fuse_qkv: false
level: 0.9
"""


def _grid(path: Path) -> None:
    from simulator.predict.grid import read_grid
    from simulator.predict.sweep import pieces, sweep_columns

    grid = read_grid(path)
    assert json.dumps(grid.facts(), default=str)
    if grid.size < 200 and max(grid.seqs) * max(grid.batches) < 1 << 22:
        columns, _ = sweep_columns(grid)
        for name in ("speedup", "dense_s", "pruned_s"):
            assert np.isfinite(columns[name]).all(), name
            assert (columns[name] > 0).all(), name
    elif grid.size < 1_000_000:
        assert next(pieces(grid), None) is not None


def _make_grid(rng: random.Random) -> bytes:
    return edit_bytes(_GRID.encode(), rng) if rng.random() < 0.2 else yaml_text(_GRID, rng)


# -- configurations of models -----------------------------------------------------------------------------------------------------


@lru_cache
def _configs() -> tuple[Mapping[str, Any], ...]:
    """One configuration of each architecture."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted((ROOT / "simulator/models").glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(
            data["model_type"],
            {k: v for k, v in data.items() if not k.startswith("_")} | {"_name_or_path": "org/some-model"},
        )
    return tuple(found.values())


def _config(path: Path) -> None:
    model = simulator.load_model(path)
    assert model.parameters > 0
    assert model.name.isprintable()
    assert 0 < len(model.name) <= 100
    assert "/" not in model.name
    phase = "decode" if model.layers > 200 else "prefill"
    w = simulator.lower(model, phase=phase, batch=1, seq=16)
    for values in (w.flops, w.bytes, w.params):
        assert np.isfinite(values).all()
        assert (values >= 0).all()
    if model.layers <= 100:
        hw = hardware.load_hardware("h100_sxm")
        s = simulator.speedup(w, simulator.prune(w, "depth", 0.5), hw)
        assert np.isfinite((s.dense_s, s.pruned_s, s.lower, s.upper)).all()


_IMPORT = (("import", "{}", "--dtype", "all", "-o", "out.parquet"),)
_PARETO = ("pareto", "llama-2-7b", "--hardware", "h100", "--phase", "decode")

TARGETS: tuple[Target, ...] = (
    Target(
        "profile",
        "gpu.yaml",
        _make_profile,
        _profile,
        (("hardware", "check", "{}"), ("gemm", "64", "64", "64", "--hardware", "{}")),
        positions=True,
    ),
    Target("arrays", "arrays.npz", _make_npz, _arrays, positions=True, names_file=False),
    Target(
        "grid", "grid.yaml", _make_grid, _grid, (("sweep", "{}", "--max", "0", "-o", "out.parquet"),), positions=True
    ),
    Target(
        "config",
        "config.json",
        lambda rng: json_text(dict(rng.choice(_configs())), rng),
        _config,
        (("models", "show", "{}"),),
    ),
    Target("csv", "table.csv", tables.make_csv, tables.read_import, _IMPORT),
    Target("parquet", "table.parquet", tables.make_parquet, tables.read_import, _IMPORT),
    Target(
        "jsonl",
        "records.jsonl",
        tables.make_jsonl,
        tables.read_jsonl,
        (*_IMPORT, ("measure", "--merge", "{}", "-o", "out.jsonl")),
    ),
    Target("results", "quality.jsonl", tables.make_results, tables.read_results),
    Target(
        "quality",
        "quality.csv",
        lambda rng: csv_text(tables.QUALITY, rng),
        tables.read_quality_table,
        ((*_PARETO, "--quality", "{}"),),
    ),
    Target(
        "speedups",
        "speedups.csv",
        lambda rng: csv_text(tables.SPEEDUPS, rng),
        tables.read_speedups,
        ((*_PARETO, "--measured", "{}"),),
    ),
    Target("gemms", "gemms.csv", tables.make_gemms, tables.read_gemms),
    Target("part", "part.parquet", tables.make_part, tables.read_part, names_file=False),
    Target("address", "address.txt", page.make_query, page.read_address, names_file=False),
    Target(
        "dropped", "dropped.txt", lambda rng: page.make_dropped(rng, _configs()), page.read_dropped, names_file=False
    ),
    Target("manifest", "manifest.json", tables.make_manifest, tables.read_manifest, names_file=False),
    Target("where", "where.txt", lines.make_where, lines.read_where, names_file=False),
)
