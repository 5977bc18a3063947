"""The formats that are read, each as a target: how to make an input near a good one, how to read it, what must hold.

A target is the function that reads a file and hands what it got to the next stage, which may refuse it in one line as
well. Whatever is neither a result nor an ``InputError`` is a bug.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import good
import mutate
import numpy as np
from guard import check_line
from mutate import PART_EDITS, TEXTS, Edit, edit_bytes, edit_parts, pq, seldom

import simulator
from calibration.devices.replay import open_named
from calibration.evidence.runs import Conditions, evaluate
from calibration.records.importers import import_table
from calibration.records.parquet import read_records, write_records
from calibration.records.store import read_store
from calibration.records.stored_timings import content_records, untimed
from simulator.engines import engine as engines
from simulator.errors import InputError
from simulator.explore.address import read_query, strict_query, to_query
from simulator.explore.app import make_app
from simulator.explore.dropped import PREFIX, profile_token, read_profile, read_token, token
from simulator.explore.predictions import predictions
from simulator.explore.questions import CALLBACKS
from simulator.figures.measured import read_measured_gemms
from simulator.hardware import library as hardware
from simulator.hardware.save import save_hardware
from simulator.models.config import ModelConfig
from simulator.models.headers import BITS
from simulator.plans.costs import costs
from simulator.plans.library import Library, read_library
from simulator.plans.search import search
from simulator.prediction.benchmarks.read import read_benches
from simulator.prediction.grid import read_grid
from simulator.prediction.measured import pass_seconds, request_of
from simulator.prediction.pareto import fronts, read_measured
from simulator.prediction.quality import choose_axis, load_quality, read_quality, table_text
from simulator.prediction.result import COLUMNS
from simulator.prediction.store import NOTES_KEY, STAMP_KEY, TableStore, stamp
from simulator.prediction.sweep import pieces, sweep_results
from simulator.prediction.where import parse_filter
from simulator.pruning._grammar import read_steps
from simulator.pruning._steps import PruningStep, prune_steps

Make = Callable[[random.Random], bytes]


class Target:
    """One format, made of the function that uses a file of it.

    ``make`` gives the bytes of one; ``commands`` read it too, {} standing for its path and {text} for what is in it; a
    refusal carries line and column (``positions``) and the name of the file (``names_file``).
    """

    def __init__(self, file: str, make: Make, *commands: str, positions: bool = False, names_file: bool = True) -> None:
        self.file, self.make, self.commands = file, make, commands
        self.positions, self.names_file = positions, names_file

    def __call__(self, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        self.read = read
        TARGETS.append(self)
        return read


TARGETS: list[Target] = []


def finite(*values: Any, least: float = 0.0) -> None:
    """All numbers are finite and above zero."""
    for value in values:
        assert np.isfinite(value).all(), value
        assert (np.asarray(value) > least).all(), value


_M, _N, _K = (np.array(v) for v in ([1, 17, 300, 8192], [4096, 8810, 64, 16384], [4096, 64, 11008, 4096]))


def times(hw: Any) -> None:
    """Predictions of a profile that loaded: finite and above zero, in every format and every kind of operator."""
    for dtype in hw.rates:
        t = simulator.gemm_time(_M, _N, _K, hw, dtype=dtype)
        finite(t.seconds, t.lower, t.upper)
        assert (t.lower <= t.upper).all()
    model = simulator.load_model("llama-3.2-1b")
    for phase, engine in (("prefill", "vllm"), ("decode", "hf")):
        dense = simulator.lower(model, phase=phase, batch=3, seq=130, dtype=next(iter(hw.rates)), engine=engine)
        s = simulator.speedup(dense, simulator.prune(dense, "width", 0.3), hw)
        finite(s.dense_s, s.pruned_s, s.speedup, s.lower, s.upper)


def _make_profile(rng: random.Random) -> bytes:
    text = good.SHIPPED if rng.random() < 0.1 else good.SMALL
    return edit_bytes(text.encode(), rng) if rng.random() < 0.3 else mutate.yaml_text(text, rng)


@Target("gpu.yaml", _make_profile, "hardware check {}", "gemm 64 64 64 --hardware {}", positions=True)
def profile(path: Path) -> None:
    hardware._load.cache_clear()  # files of equal size within a tick of the clock look the same
    if path.stat().st_size % 8 == 0:
        for line in hardware.check_hardware(path):
            assert line.isprintable(), line
            assert line.startswith(f"{path}:"), line
    hw = hardware.load_hardware(path)
    times(hw)
    again = path.with_name("again.yaml")
    save_hardware(hw, again)  # what is read can be written and read again
    assert hardware.load_hardware(again).sm_count == hw.sm_count


def _make_engine(rng: random.Random) -> bytes:
    return edit_bytes(good.ENGINE.encode(), rng) if rng.random() < 0.3 else mutate.yaml_text(good.ENGINE, rng)


@Target("engine.yaml", _make_engine, "speedup llama-3.2-1b --hardware h100 --family depth --engine {}", positions=True)
def engine(path: Path) -> None:
    engines._load.cache_clear()
    for line in engines.check_engine(str(path)):
        assert line.isprintable(), line
        assert line.startswith(f"{path}:"), line
    read = engines.load_engine(str(path))
    finite(read.kernels, least=-1.0)  # 0: part of another
    model = simulator.load_model("llama-3.2-1b")
    for phase in ("decode", "serve"):
        new = 4 if phase == "serve" else 0
        w = simulator.lower(model, phase=phase, batch=3, seq=130, new_tokens=new, engine=str(path))
        c = simulator.workload_time(w, simulator.load_hardware("h100"))
        finite(c.total_s, c.total_lower_s, c.total_upper_s, c.device_s)


def _make_stack(rng: random.Random) -> bytes:
    return edit_bytes(good.STACK.encode(), rng) if rng.random() < 0.3 else mutate.yaml_text(good.STACK, rng)


@Target("mine.vllm.yaml", _make_stack, "hardware check {}", positions=True)
def stack(path: Path) -> None:
    owner = path.with_name("mine.yaml")
    owner.write_text(good.FACTS, encoding="utf-8")
    profile(owner)


def _make_arrays(rng: random.Random) -> bytes:
    return mutate.npz_bytes(good.arrays_of(rng.choice(good.OPERATORS)), rng)


@Target("arrays.npz", _make_arrays, positions=True, names_file=False)
def arrays(path: Path) -> None:
    raw = path.read_bytes()
    operators = [o for o in good.OPERATORS if any(name.encode() in raw for name in good.arrays_of(o))] or ["gemm"]
    beside = path.with_name("with_arrays.yaml")
    beside.write_text(good.profile_with(raw, path.name, operators), encoding="utf-8")
    profile(beside)


@Target("mine.vllm.npz", lambda rng: mutate.npz_bytes(good.STACK_ARRAYS, rng), positions=True, names_file=False)
def stack_arrays(path: Path) -> None:
    path.with_name("mine.vllm.yaml").write_text(good.with_digest(path.read_bytes(), path.name), encoding="utf-8")
    stack(path)


def _make_grid(rng: random.Random) -> bytes:
    return mutate.yaml_text(rng.choice(good.GRIDS), rng)


@Target("grid.yaml", _make_grid, "sweep {} --max 0 -o out.parquet", positions=True)
def grid(path: Path) -> None:
    found = read_grid(path)
    assert json.dumps(found.facts(), default=str)
    if found.size < 200 and max(found.seqs) * max(found.batches) < 1 << 22:
        results = sweep_results(found)
        finite(*(results.columns[name] for name in ("speedup", "dense_s", "pruned_s")))
    elif found.size < 1_000_000:
        assert next(pieces(found), None) is not None


_PRUNED = "speedup llama-3.2-1b --hardware h100 --json --prune "


@Target("plan.yaml", lambda rng: mutate.yaml_text(good.PLAN, rng), _PRUNED + "{}")
def plan(path: Path) -> None:
    _pruned(read_steps(str(path)), str(path))


_LINKS = ("pcie", "pcie-host", "pcie4x8", "pcie3x16-host", "pcie5", "bridge", "nvswitch", "xgmi")


def _make_link(rng: random.Random) -> bytes:
    """The name of a connection, mostly with a few characters changed."""
    parts = edit_parts(re.split("(\\d+|-)", rng.choice(_LINKS)), rng, _LINK_EDITS)
    return seldom("".join(parts).encode("utf-8", "surrogatepass"), rng)


_LINK_EDITS: dict[Edit, int] = {
    **PART_EDITS,
    lambda part, rng, parts: [rng.choice(("1", "3", "4", "6", "7", "8", "16", "32", "x", "-host", "PCIe", " "))]: 6,
    lambda part, rng, parts: [rng.choice(TEXTS)]: 2,
}


_LINKED = "speedup llama-3.2-1b --hardware l40s --family depth --sparsity 0.5 --devices 2 --json --link "


@Target("link.txt", _make_link, _LINKED + "{text}", names_file=False)
def link(path: Path) -> None:
    """A connection that exists for a device prices a pass of two of them."""
    text, device = path.read_bytes().decode("utf-8", "replace"), ("l40s", "a6000", "h100")[path.stat().st_size % 3]
    rows = simulator.table(
        "llama-3.2-1b", device, "depth", 0.5, phase="decode", scenario=simulator.Scenario(devices=2, link=text)
    )
    finite(*(s for row in rows for s in (row.dense_s, row.pruned_s, row.speedup)))


_PRUNE_WORDS = """
width depth low_rank token experts shortgpt wanda-2:4 semi_structured mlp=0.3 heads=20% attention=.2 kv=0.5 hidden=0.1
layers=4-11 layers=0,2 layers=99
layers=3-1 layers= align=16 align=x unit=mlp + ++ = % 0.25 25% 1 -1 0.3.1 = mlp heds=0.2
Width mlp:0.3 layers=0-99999999 kernel=ideal drop=3 inner=100
"""
_PRUNE_EDITS: dict[Edit, int] = {
    **PART_EDITS,
    lambda part, rng, parts: [part, rng.choice(_PRUNE_WORDS.split())]: 2,
    lambda part, rng, parts: [rng.choice(_PRUNE_WORDS.split())]: 2,
    lambda part, rng, parts: [rng.choice(TEXTS)]: 1,
}


def _make_prune(rng: random.Random) -> bytes:
    text = " ".join(edit_parts(rng.choice(good.PRUNINGS).split(" "), rng, _PRUNE_EDITS))
    return seldom(text.encode("utf-8", "surrogatepass"), rng)


@Target("prune.txt", _make_prune, _PRUNED + "{text}", names_file=False)
def prune_text(path: Path) -> None:
    _pruned(read_steps(path.read_bytes().decode("utf-8", "replace")))


def _pruned(steps: tuple[PruningStep, ...], plan: str = "") -> None:
    """What reads prunes a model, or is refused for it; its own text reads back."""
    assert read_steps(" + ".join(map(str, steps))) == steps or any(step.options for step in steps)
    dense = simulator.lower(simulator.load_model("llama-3.2-1b"), phase="decode", batch=2, seq=100)
    pruned = prune_steps(dense, steps, plan=plan)
    assert 0.0 < pruned.parameters <= dense.parameters * 1.3
    finite(pruned.flops.sum(), pruned.bytes.sum())


def headers(rng: random.Random) -> bytes:
    """A small checkpoint with tensors gone, renamed, of other shapes and formats: some are models."""
    tensors = dict(rng.choice(good.CHECKPOINTS))
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        name = rng.choice(sorted(tensors))
        dtype, shape = tensors.pop(name)
        other = rng.choice(sorted(tensors))
        axis = rng.randrange(max(len(shape), 1))
        sizes = (0, 1, 3, 8, 16, 24, 64, 2**20, 2**40)
        match rng.randrange(7):
            case 0:  # one of its widths, everywhere
                old, new = (*shape, 8)[axis], rng.choice(sizes[2:7])
                tensors = {n: (d, [new if v == old else v for v in s]) for n, (d, s) in tensors.items()}
                tensors[name] = (dtype, [new if v == old else v for v in shape])
            case 1:
                tensors[name] = (dtype, [*shape[:axis], rng.choice(sizes), *shape[axis + 1 :]])
            case 2:
                tensors[other] = (dtype, shape)
            case 3:
                tensors[name] = (rng.choice(sorted(BITS)), shape)
            case 4:
                leaf = rng.choice(("qweight", "weight_packed", "compressed", "bitmask", "scales", "meta", "bias", "x"))
                tensors |= {
                    name: (dtype, shape),
                    f"{name.rpartition('.')[0]}.{leaf}": (rng.choice(sorted(BITS)), shape),
                }
            case 5:
                number = rng.choice(("0", "1", "2", "7", "99999"))
                tensors[re.sub(r"layers.[0-9]", f"layers.{number}", name)] = (dtype, shape)
    content, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = mutate.json_text(content, rng) if rng.random() < 0.3 else json.dumps(content).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * min(end, 1 << 20)


@Target("model.safetensors", headers, names_file=False)
def _checkpoint(path: Path) -> None:
    """Read beside the configurations of some architectures; what is read has the parameters of its lowered pass."""
    for content in good.SMALL_CONFIGS:
        (path.parent / "config.json").write_text(json.dumps(content), encoding="utf-8")
        with contextlib.suppress(InputError):
            model = simulator.load_model(path.parent)
            for phase in ("prefill", "decode"):
                w = simulator.lower(model, phase=phase, batch=1, seq=16, engine="hf")
                finite(w.flops.sum(), w.parameters)
            check_line(model.found or "none")
            break
    else:
        simulator.load_model(path.parent)  # the refusal itself


@Target("model.safetensors.index.json", lambda rng: mutate.json_text(good.INDEX, rng), names_file=False)
def index(path: Path) -> None:
    for file, content in good.SHARDED.items():
        if not (beside := path.with_name(file)).exists():
            beside.write_bytes(content)
    model = simulator.load_model(path.parent)
    finite(simulator.lower(model, phase="decode", batch=1, seq=16).flops.sum())


@Target("layers.json", lambda rng: mutate.json_text(good.LAYERED, rng), "models show {}")
@Target("config.json", lambda rng: mutate.json_text(dict(rng.choice(good.CONFIGS)), rng), "models show {}")
def config(path: Path) -> None:
    model = simulator.load_model(path)
    assert model.parameters > 0
    assert model.name.isprintable()
    assert 0 < len(model.name) <= 100
    assert "/" not in model.name
    dense = simulator.lower(model, phase="decode" if model.layers > 200 else "prefill", batch=1, seq=16)
    finite(dense.flops, dense.bytes, dense.params, least=-1.0)
    if model.layers <= 100:
        s = simulator.speedup(dense, simulator.prune(dense, "depth", 0.5), hardware.load_hardware("h100_sxm"))
        finite(s.dense_s, s.pruned_s, s.lower, s.upper)


_SMALL = simulator.load_model({key: value for key, value in good.LAYERED.items() if key != "block_configs"})


@Target("library.json", lambda rng: mutate.json_text(rng.choice(good.LIBRARIES), rng))
def library(path: Path) -> None:
    found = _library(path, _SMALL)
    assert len(found.layers) == _SMALL.layers
    for i, own in enumerate(found.layers):
        assert own[0] == _SMALL.layout[i]
        assert all(block.kv_heads <= 4 and block.inner <= 512 for block in own)
        assert all(len(column[i]) == len(own) for column in found.values.values())
    for name, columns in found.values.items():
        assert name.isprintable(), name
        assert not any(np.isinf(column).any() for column in columns)


@Target("solution_0.json", lambda rng: mutate.json_text(rng.choice(good.VALIDATIONS), rng), names_file=False)
@Target("teacher.json", lambda rng: mutate.json_text(good.TEACHER, rng), names_file=False)
def validation(path: Path) -> None:
    """One of the files of a folder."""
    for name, content in good.FOLDER.items():
        if not (file := path.with_name(name)).exists():
            file.write_text(json.dumps(content))
    if path.stat().st_size % 8:
        read_library(path.parent, _SMALL)
    else:
        _library(path.parent, _SMALL)


_IMPORT = "import {} --dtype all -o out.parquet"


@Target("table.csv", lambda rng: mutate.csv_text(rng.choice(good.TABLES), rng), _IMPORT)
@Target("table.parquet", lambda rng: mutate.parquet_bytes(rng.choice(good.tables()), rng), _IMPORT)
def imported(path: Path) -> None:
    hw = hardware.load_hardware("h100_sxm") if path.stat().st_size % 2 else None
    records = import_table(path, hw=hw, dtype="all").records
    assert len(records)
    finite(records.seconds)
    assert all(str(label) for label in records.labels())
    if len(records) < 200 and path.stat().st_size % 4 == 0:
        assert read_records(write_records(records)).digest() == records.digest()


def _make_gemms(rng: random.Random) -> bytes:
    text = good.GEMMS.replace(",predicted_s", ",other") if rng.random() < 0.5 else good.GEMMS
    return mutate.csv_text(text, rng) if rng.random() < 0.6 else mutate.parquet_bytes(good.arrow(text), rng)


@Target("gemms.csv", _make_gemms)
def gemms(path: Path) -> None:
    table = read_measured_gemms(path)
    predicted = table.predict(hardware.load_hardware("h100_sxm"))
    finite(table.seconds, predicted)
    assert len(table.seconds) == len(predicted) == len(table)


_LINE_EDITS: dict[Edit, int] = {lambda row, rng, rows: [mutate.json_tree(row, rng, 2)]: 12, **PART_EDITS}


def _run_lines(rows: Sequence[Any], rng: random.Random) -> bytes:
    """Lines with right checksums, one or two changed, seldom doubled, gone or in another's place."""
    return seldom(b"".join(map(good.crc_line, edit_parts(rows, rng, _LINE_EDITS, 2))), rng)


@Target("records.jsonl", lambda rng: _run_lines(good.RUN, rng), _IMPORT)
def jsonl(path: Path) -> None:
    content = read_store(path)
    untimed(content.rows)
    content_records(content)
    if path.stat().st_size % 4 == 0:
        imported(path)


def _make_replay(rng: random.Random) -> bytes:
    rows = edit_parts(good.RUN, rng, _LINE_EDITS, 2)
    return seldom(b"".join(json.dumps(row).encode() + b"\n" for row in rows), rng)


@Target("replay.jsonl", _make_replay)
def replayed(path: Path) -> None:
    device = open_named(str(path))
    assert all(0.0 < seconds < math.inf for seconds in device.timings.values())


_PARETO = "pareto llama-2-7b --hardware h100 --phase decode"


def _library(path: Path, model: ModelConfig) -> Library:
    """What is read of a library can be priced and searched."""
    library = read_library(path, model)
    assert all(own[0] == dense for own, dense in zip(library.layers, model.layout))
    if len(library) < 200:
        found = costs(model, "h100", library, phase="decode")
        finite(found.columns["seconds"], found.columns["lower"], least=-1e-12)
    if library.values and len(library) < 200:
        try:
            plan = search(model, "h100", 1.05, library)
        except InputError as error:
            if "no plan of these variants" not in str(error):  # which is not the fault of the file
                raise
        else:
            finite(plan.results[0].speedup)
    return library


_LARGE = simulator.load_model("llama-3.2-1b")
_SEARCH = "search llama-3.2-1b --hardware h100 --target 1.05 --scores {}"


@Target("scores.csv", lambda rng: mutate.csv_text(good.SCORES, rng), _SEARCH)
def scores(path: Path) -> None:
    _library(path, _LARGE)


@Target(
    "choices.yaml", lambda rng: mutate.yaml_text(good.CHOICES, rng), "costs llama-3.2-1b --hardware h100 --choices {}"
)
def choices(path: Path) -> None:
    _library(path, _LARGE)


@Target("quality.csv", lambda rng: mutate.csv_text(good.QUALITY, rng), f"{_PARETO} --quality {{}}")
def quality(path: Path) -> None:
    table = load_quality(path)
    assert read_quality(table_text(table.rows)).models == table.models
    assert all(np.isfinite(row.relative_loss) for row in table.rows)
    rows, model = table.of_model("llama-2-7b"), simulator.load_model("llama-3.2-1b")
    # an engine that has kernels for every family, so that what is refused is the file
    found, _ = fronts(model, ["h100_sxm"], rows, choose_axis(rows), ["decode"], [1], [64], engine=["reference"])
    assert all(np.isfinite((p.loss, p.speedup)).all() for f in found for p in f.points)


def _make_harness(rng: random.Random) -> bytes:
    return seldom(json.dumps(mutate.json_tree(good.HARNESS, rng, 2)).encode(), rng)


@Target("results.json", _make_harness)
def harness(path: Path) -> None:
    path.with_name("dense.json").write_text(json.dumps(good.HARNESS))
    listed = path.with_name("listed.csv")
    listed.write_text(f"results,family,sparsity\ndense.json,dense,0\n{path.name},width,0.3\n")
    rows = load_quality(listed).rows
    assert len(read_quality(table_text(rows))) == len(rows)
    assert all(np.isfinite(row.relative_loss) for row in rows)


def _make_bench(rng: random.Random) -> bytes:
    """One result, seldom two, a line each."""
    lines = [json.dumps(mutate.json_tree(rng.choice(good.BENCHES), rng, 2)) for _ in range(rng.choice((1, 1, 1, 2)))]
    return seldom("\n".join(lines).encode(), rng, 0.1)


_SHAPE = "--batch 8 --seq 1024 --new-tokens 128 --json"
_DENSE = f"speedup llama-3.1-8b --hardware h100 --family depth --sparsity 0.25 --phase generate {_SHAPE}"
_RUNS = f"validate --runs . --hardware h100 --model llama-3.1-8b --engine vllm {_SHAPE}"
_GIVEN = Conditions(model="llama-3.1-8b", hardware="h100", engine="vllm", batch=8, seq=1024, new_tokens=128)


@Target("bench.json", _make_bench, _DENSE + " --dense-from {}", _RUNS)
def bench(path: Path) -> None:
    for result in evaluate(path.parent, _GIVEN):  # which skips what it cannot read
        check_line(result.reason or "none")
        finite(*([result.compared.measured, result.compared.predicted] if result.compared else []))
        assert np.isfinite(result.compared.error if result.compared else 0.0)
    for run in read_benches(path):
        phase, batch, seq, steps = request_of(run, batch=None if run.concurrency else 8, seq=1024, output=129)
        finite(pass_seconds(run, phase, batch, seq, steps))


@Target("speedups.csv", lambda rng: mutate.csv_text(good.SPEEDUPS, rng), f"{_PARETO} --measured {{}}")
def speedups(path: Path) -> None:
    for row in read_measured(path):
        assert 0.0 < row.lower <= row.speedup <= row.upper < float("inf")
        row.fits(0.25, {"family": "depth", "batch": 1})


_MANIFEST = {"digest": "d", "parts": 2, "version": "1", "grid": {"models": ["a"]}}


def _part() -> Any:
    table = good.arrow(good.PART)
    return table.replace_schema_metadata({NOTES_KEY: b'{"left out": [1, 0.5]}', STAMP_KEY: stamp("d", 1, len(table))})


@Target("part.parquet", lambda rng: mutate.parquet_bytes(_part(), rng), names_file=False)
def part(path: Path) -> None:
    store = TableStore(path.with_name("u.parquet"), "d", 2)
    store.folder.mkdir(exist_ok=True)
    store.target.unlink(missing_ok=True)
    first = _part()
    own = {STAMP_KEY: stamp("d", 0, len(first))}
    pq.write_table(first.replace_schema_metadata({**first.schema.metadata, **own}), store.part(0))
    path.replace(store.part(1))
    rows, notes = store.assemble()
    assert all(f"{x:g}" for at in notes.values() for x in at)
    assert pq.read_metadata(store.target).num_rows == rows
    assert not list(path.parent.glob("*.tmp"))


@Target("manifest.json", lambda rng: mutate.json_text(_MANIFEST, rng), names_file=False)
def manifest(path: Path) -> None:
    folder = path.parent / "t.parquet.parts"
    folder.mkdir(exist_ok=True)
    path.replace(folder / "manifest.json")
    with TableStore(path.parent / "t.parquet", "d", 2).opened({}) as there:
        assert there == set()


_GOOD_WORDS = """
1 64 1,8 0.25 0.1,0.5 decode prefill prefill,decode bf16 fp16 a100 h100,4090 depth depth,token align=16 align=64 512
2048 1.2 mlp=0.5 q=0.1,down=0.5 4096 cpu low_rank width
"""
_ODD_WORDS = """
1,64 1,,2 , = 0.999999 1.0 0.25,0.5 q=0.1 mlp=0.5,attention=nan mlp=1e999 inner=8810 inner=-1 inner=1e999 align=0
align=nan align=1_0 rank=16,32 rank=9999999999999999999999 ~ /dev/zero generate serve prefill,decode trtllm 2147483648
-- --json
"""
_WORDS = (*TEXTS, *_ODD_WORDS.split(), "9" * 5000, "\udcff")


def word(rng: random.Random, plausible: float = 0.6) -> str:
    return rng.choice(_GOOD_WORDS.split() if rng.random() < plausible else _WORDS)


_TAILS = ("%", "%ff", "%00", "%0a", "%F0%9F", "+", "&", "=", "#", ";", "%2e%2e%2f", "," * 3000)
_PAIR_EDITS: dict[Edit, int] = {
    **PART_EDITS,
    lambda pair, rng, pairs: [(pair[0], quote(word(rng), errors="surrogatepass"))]: 3,
    lambda pair, rng, pairs: [(pair[0], word(rng))]: 1,
    lambda pair, rng, pairs: [(rng.choice((rng.choice(pairs)[0], "x", "", "Model", "constructor")), pair[1])]: 1,
    lambda pair, rng, pairs: [pair, (pair[0], word(rng))]: 1,
    lambda pair, rng, pairs: [(pair[0], pair[1] + rng.choice(_TAILS))]: 1,
}


def _make_address(rng: random.Random) -> bytes:
    pairs = edit_parts([pair.split("=") for pair in good.ADDRESS.split("&")], rng, _PAIR_EDITS)
    return seldom("&".join(map("=".join, pairs)).encode("utf-8", "surrogatepass"), rng)


@Target("address.txt", _make_address, names_file=False)
def address(path: Path) -> None:
    """Whatever it says there is a state, the same from its own address; what was bad is said line by line."""
    state, problems = read_query(path.read_bytes().decode("utf-8", "replace"))
    for line in problems:
        check_line(line)
    assert strict_query(to_query(state)) == state
    if problems:
        raise InputError(problems[0])
    if path.stat().st_size % 16 == 0:  # what the page shows: numbers, or a reason
        shown = predictions(state)
        assert shown.problem or all(
            np.isfinite((r.speedup, r.speedup_lower, r.speedup_upper)).all() for r in shown.table
        )


def _make_dropped(rng: random.Random) -> bytes:
    """A dropped file, or a token that nobody made."""
    whole = mutate.json_text(dict(rng.choice(good.CONFIGS)), rng)
    if rng.random() < 0.7:
        return whole
    inner = rng.choice((whole, b"0", b"[]", b'{"file": 1, "config": {}}', b'{"file":"a","config":' + whole + b"}"))
    token = b"dropped:" + base64.urlsafe_b64encode(zlib.compress(inner + b" " * rng.choice((0, 300_000))))
    return seldom(token, rng, 0.7)


@Target("dropped.txt", _make_dropped, names_file=False)
def dropped(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    file, model = read_token(text if text.startswith(PREFIX) else token(text, "a\\b/../config.json"))
    assert file.isprintable()
    assert "/" not in file
    assert model.parameters > 0


def _client() -> Any:
    server = make_app().server
    server.testing = True  # an exception of the server is one here
    return server.test_client()


def question(path: Path) -> None:
    """Answered, or refused with a status from 400 to 499."""
    status = CLIENT.post(CALLBACKS, data=path.read_bytes(), content_type="application/json").status_code
    assert status == 200 or 400 <= status < 500, status
    if status != 200:
        raise InputError(f"status {status}")


if find_spec("dash"):
    CLIENT = _client()  # here, for it reads and asks what no input may
    Target("question.json", lambda rng: mutate.json_text(rng.choice(good.QUESTIONS), rng), names_file=False)(question)


@Target("dropped.yaml", lambda rng: mutate.yaml_text(good.FACTS, rng))
def dropped_profile(path: Path) -> None:
    _, hw = read_profile(profile_token(path.read_bytes().decode("utf-8", "replace"), path.name))
    times(hw)


_WHERE_WORDS = """
(  )  speedup  family  'depth'  and  or  not  in  [1]  ==  <  1e400  lambda: 0  f'{1}'  ideal  true  / 0  ** 9
__import__  1j  ...  '\\ud800'  :=
"""
_WHERE_PARTS = (*re.split("  |\n", _WHERE_WORDS), "\x00", "9" * 400, "(" * 300, "-" * 500, "not " * 400)
_WHERE_EDITS: dict[Edit, int] = {
    lambda part, rng, parts: [rng.choice(_WHERE_PARTS), " ", part]: 1,
    lambda part, rng, parts: [rng.choice(_WHERE_PARTS)]: 1,
}


def _make_where(rng: random.Random) -> bytes:
    return seldom("".join(edit_parts(re.split(r"(\W)", good.WHERE), rng, _WHERE_EDITS)).encode(), rng, 0.3)


@Target("where.txt", _make_where, names_file=False)
def where(path: Path) -> None:
    found = parse_filter(path.read_bytes().decode("utf-8", "surrogateescape"), COLUMNS)
    table = {
        name: np.array(["depth"] * 3, dtype=object) if kind is str else np.arange(3).astype(kind)
        for name, kind in COLUMNS.items()
    }
    assert found(table.__getitem__, 3).shape == (3,)


def _spoilt(words: list[str], rng: random.Random, parts: Sequence[Any]) -> list[list[str]]:
    raw = edit_bytes(words[-1].encode("utf-8", "surrogatepass"), rng, 2)
    return [[*words[:-1], raw.decode("utf-8", "surrogateescape")]]


_WORD_EDITS: dict[Edit, int] = {
    lambda words, rng, parts: [[*words[:-1], word(rng)]]: 6,
    lambda words, rng, parts: []: 1,
    _spoilt: 1,
}


def command_line(rng: random.Random) -> list[str]:
    """A command line near a good one: options with their values, one or two changed."""
    command, *parts = re.findall(r"--\S+ [^-\s]\S*|\S+", rng.choice(good.LINES.split("\n")))
    return [command, *(w for words in edit_parts(map(str.split, parts), rng, _WORD_EDITS, 2) for w in words)]
