"""Engine files: shipped files are valid, an error has its place, and a path works like a name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tables import rows_of

import simulator
from simulator.codes import ROLES
from simulator.engines.engine import (
    Engine,
    check_engine,
    list_engines,
    load_engine,
    sparse24_engines,
)
from simulator.errors import InputError
from simulator.request import Request

pytestmark = pytest.mark.quick

GOOD = """\
schema_version: 1
name: mine
title: "An engine of one's own"
stacks: [vllm, sglang]
sources:
  bench: "a benchmark, https://example.org/bench"
fuse: [qkv]
graph: [decode]
logits: all
launches:
  mlp_norm: 7
host:
  pass: {value: 0.5 ms, log_sd: 0.3, source: bench}
  sequence: {value: 20 us, log_sd: 0.2, source: bench, note: "of 8 to 64"}
  gap: {value: 100 ns, log_sd: 0.1, source: bench}
quantize: {inputs: [o, down], source: bench}
log_sd: {value: 0.05, source: bench}
weight_only: [int4]
sparse24: {cusparselt: {formats: [bf16], source: bench, on: [hopper]}}
loads:
  layer_inner: {value: true, source: bench, how: "with widths in a list", model_types: [llama], multiple: 64}
widths:
  int4: {multiple: 128, source: bench, required: true}
dynamic:
  kv_cache: {how: "with --evict", source: bench}
"""
SHIPPED = Path(simulator.__file__).parent / "engines"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("name", list_engines())
def test_every_shipped_engine_is_clean_and_says_where_its_values_come_from(name: str) -> None:
    path = SHIPPED / f"{name}.yaml"
    assert check_engine(str(path)) == []
    engine = load_engine(name)
    assert engine == load_engine(str(path))
    assert engine.name == name
    assert engine.stacks
    assert engine.sources
    for value in (engine.gap, engine.each_pass, engine.each_sequence):
        assert (value.source in engine.sources) == (value.value > 0.0)
        assert (value.log_sd > 0.0) == (value.value > 0.0)  # no host is known exactly
    for name, usual in (
        ("one_token", 1.0),
        ("prefill_wait", 0.0),
        ("own_code", 1.0),
        ("log_sd", 0.0),
        ("apart_log_sd", 0.0),
        ("composed_log_sd", 0.0),
    ):
        share = getattr(engine, name)
        assert share.source in engine.sources or share.value == usual, name
    assert engine.quantize.source in engine.sources or engine.quantize == Engine().quantize
    assert len(set(engine.quantize.inputs)) == len(engine.quantize.inputs)
    assert engine.prefill_wait.value <= 1.0
    assert engine.log_sd.value < 0.1


def test_names_aliases_and_paths_find_the_same_engine() -> None:
    assert Request.engine in list_engines()
    for alias in (
        "hf",
        "HF",
        "transformers",
        "Hugging Face",
        "hugging-face",
        "eager",
        str(SHIPPED / "hf.yaml"),
    ):
        assert load_engine(alias).name == "hf"
    for alias in ("gpt-fast", "torch.compile", "TorchAO"):
        assert load_engine(alias).name == "compile"
    assert load_engine("TensorRT-LLM").name == "trtllm"
    assert load_engine("vllm") is load_engine("VLLM")
    assert sparse24_engines() == ("compile", "hf", "reference", "trtllm", "vllm@v1")
    aliases = [
        alias.lower() for name in list_engines() for alias in (name, *load_engine(name).aliases)
    ]
    assert len(set(aliases)) == len(aliases)


def test_no_name_is_bare_kernels() -> None:
    bare = load_engine("")
    assert bare == Engine()
    assert bare is load_engine("")
    assert not bare.fuse
    assert (bare.logits, bare.stacks, bare.each_pass.value) == ("last", (), 0.0)
    assert bare.in_graph("prefill")
    assert bare.in_graph("decode")
    assert (bare.kernels == 1.0).all()


def test_a_file_of_one_s_own_is_read_to_the_letter(good: Path) -> None:
    assert check_engine(str(good)) == []
    engine = load_engine(str(good))
    assert (engine.name, engine.stacks, engine.fuse, engine.logits) == (
        "mine",
        ("vllm", "sglang"),
        ("qkv",),
        "all",
    )
    assert [engine.in_graph(phase) for phase in ("prefill", "decode")] == [False, True]
    assert (engine.each_pass.value, engine.each_sequence.value, engine.gap.value) == (
        5e-4,
        2e-5,
        1e-7,
    )
    assert (engine.each_pass.log_sd, engine.each_sequence.note) == (0.3, "of 8 to 64")
    assert engine.kernels[ROLES.index("mlp_norm")] == 7.0
    assert engine.kernels.sum() == len(ROLES) + 6.0
    assert (engine.quantize.inputs, engine.prefill_wait.value, engine.log_sd.value) == (
        ("o", "down"),
        0.0,
        0.05,
    )
    inner, narrow = engine.loads["layer_inner"], engine.widths["int4"]
    assert (inner.value, inner.model_types, inner.multiple) == (True, ("llama",), 64)
    assert (narrow.multiple, narrow.required, engine.dynamic["kv_cache"].how) == (
        128,
        True,
        "with --evict",
    )
    assert engine.sparse24["cusparselt"].formats == ("bf16",)
    assert engine.sparse24["cusparselt"].searched
    assert engine.sparse24_kernels("bf16", "bf16", "hopper") is engine.sparse24_kernels(
        "bf16", "bf16"
    )
    assert (
        engine.sparse24_kernels("bf16", "bf16", "ada")
        is engine.sparse24_kernels("fp8", "fp8")
        is None
    )
    assert engine.path == good


def test_2_4_kernels_by_library_format_and_architecture() -> None:
    compiled, stock = load_engine("compile"), load_engine("vllm")
    assert compiled.sparse24_kernels("bf16", "bf16") is compiled.sparse24["cusparselt"]
    assert not compiled.sparse24["cusparselt"].searched
    assert compiled.sparse24_kernels("bf16", "int4") is compiled.sparse24["marlin"]
    # weights alone: not the int8 products of cuSPARSELt
    assert compiled.sparse24_kernels("bf16", "int8") is None
    assert compiled.sparse24_kernels("fp8", "fp8", "hopper") is compiled.sparse24["cutlass"]
    assert compiled.sparse24_kernels("fp8", "fp8", "ada") is None
    assert stock.sparse24 == {}
    assert set(load_engine("vllm@0.10").sparse24) == {"cutlass", "marlin"}
    assert sparse24_engines("fp8", "fp8", "ada") == ("reference", "trtllm")


BAD = """
value: 0.5 ms,     | value: 5 s,        | 13:17: host.pass.value               | expected 0 s to 1 s, got '5 s'
0.3, source: bench | 0.3, source: guess | 13:46: host.pass.source              | 'guess' is not listed under sources
[vllm, sglang]     | [vlm]              | 4:10: stacks.0                       | did you mean vllm?
mlp_norm: 7        | mlp_nrm: 7         | 11:3: launches.mlp_nrm               | unknown operator; did you mean mlp_norm? Known: q, k, v
mlp_norm: 7        | mlp_norm: 101      | 11:13: launches.mlp_norm             | expected a whole number from 0 to 100
fuse: [qkv]        | fuse: [gate]       | 7:8: fuse.0                          | did you mean gate_up?
{cusparselt: {     | {cusparse: {       | 19:12: sparse24.cusparse             | unknown library; did you mean cusparselt? Known: cusparselt
[bf16], source     | [bf17], source     | 19:35: sparse24.cusparselt.formats.0 | did you mean bf16?
name: mine         | name: My Engine    | 2:7: name                            | expected a name of lower-case letters
layer_inner:       | inner:             | 21:3: loads.inner                    | unknown feature; did you mean linear? Known: uniform, heads
int4: {mult        | int5: {mult        | 23:3: widths.int5                    | unknown format; did you mean int8? Known: fp32, tf32
multiple: 128,     | multiple: 0,       | 23:20: widths.int4.multiple          | expected a whole number from 1 to 65536
"""
"""Texts of a good file, their replacements, and the place and reason of the error."""


@pytest.mark.parametrize(("old", "new", "place", "reason"), rows_of(BAD))
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, old: str, new: str, place: str, reason: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace(old, new))
    lines = check_engine(str(path))
    assert GOOD.count(old) == 1
    assert lines, new
    assert lines[0].startswith(f"{path}:{place}: "), lines
    assert reason in lines[0]
    with pytest.raises(InputError) as error:
        load_engine(str(path))
    assert str(error.value).startswith(lines[0])
    assert "\n" not in str(error.value)


def test_a_path_runs_wherever_a_name_does(good: Path, cli: Any) -> None:
    path = str(good)
    w = simulator.lower("llama-3.2-1b", phase="prefill", batch=2, seq=64, engine=path)
    assert w.is_role("qkv").any()
    assert w.is_role("gate").any()
    assert w.m[w.is_role("lm_head")].tolist() == [2 * 64]
    line = (
        f"speedup llama-3.2-1b --hardware h100 --family depth --sparsity 0.25 --engine {path},vllm"
        " --csv -"
    )
    rows = cli.out(line).splitlines()
    assert [row.split(",")[2] for row in rows] == ["engine", "mine", "vllm"]
    (record,) = simulator.table(["llama-3.2-1b"], ["h100"], ["depth"], [0.25], engine=[path])
    assert (record.engine, record.speedup) == (
        "mine",
        pytest.approx(float(rows[1].split(",")[16]), rel=1e-12),
    )
    good.write_text(GOOD.replace("qkv", "qvk"))
    assert f"{path}:7:8: fuse.0: " in cli.refused(line)


@pytest.mark.parametrize("name", [*list_engines(), "vllm@0.9"])
def test_what_engines_show_prints_is_a_file_of_the_same_engine(
    name: str, tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(cli.out(f"engines show {name}"))
    printed, engine = load_engine(str(file)), load_engine(name)
    others = ("name", "short_title", "aliases", "generations", "generation", "path")
    for part in (field.name for field in fields(Engine) if field.name not in others):
        assert getattr(printed, part) == getattr(engine, part), part
