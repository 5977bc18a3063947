"""Public names are documented, their examples type-checked, and public objects are shown in the
same ways."""

from __future__ import annotations

import doctest
import inspect
import json
import math
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from operator_times import decode_time

import simulator
from simulator import InputError
from simulator.display import Displayed
from simulator.prediction.advise import advise
from simulator.prediction.explain import explanations
from simulator.prediction.prunings import Pruning
from simulator.prediction.result import COLUMNS, Result
from simulator.prediction.runnable import runnable
from simulator.pruning import general_families

NOTHING = Pruning.of("depth", 0.0)
ROOT = Path(__file__).resolve().parent.parent


def documented() -> Iterator[tuple[str, Any]]:
    """Public functions and classes, and the public methods and properties of the classes, by
    name."""
    for name in dir(simulator):
        public = getattr(simulator, name)
        if callable(public):
            yield name, public
        if inspect.isclass(public):
            for member in dir(public):
                value = inspect.getattr_static(public, member)
                function = getattr(
                    value, "fget", getattr(value, "func", getattr(value, "__func__", value))
                )
                if not member.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{member}", function


NOT_FITTING = ("ES01", "SA01")
"""Checks of numpydoc that this project does not apply: an extended summary, and a section See
Also."""

DATA = ("FAMILIES", "METHODS", "__version__")


@pytest.mark.parametrize("name", sorted({*dir(simulator)} - {*DATA}))
def test_public_docstrings_are_valid_numpydoc(name: str) -> None:
    validate = pytest.importorskip("numpydoc.validate").validate
    errors = validate(f"simulator.{name}")["errors"]
    assert [error for error in errors if error[0] not in NOT_FITTING] == []


def test_public_methods_mention_their_parameters() -> None:
    lacking = []
    for name, public in documented():
        text = inspect.getdoc(public) or ""
        parameters = [] if inspect.isclass(public) else [*inspect.signature(public).parameters]
        needed = [
            rf"\b{parameter}\b" for parameter in parameters if parameter not in ("self", "cls")
        ]
        lacking += [(name, what) for what in needed or ["."] if not re.search(what, text)]
    assert not lacking


@pytest.mark.slow
def test_the_examples_have_the_types_that_are_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = pytest.importorskip("mypy.api")
    parse, file = doctest.DocTestParser(), tmp_path / "examples.py"
    texts = [
        "".join(e.source for e in parse.get_examples(p.__doc__ or ""))
        for n, p in documented()
        if "." not in n
    ]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = (
        re.findall(r"^```python\n(.*?)^```$", p.read_text("utf-8"), re.M | re.S)
        for p in pages
        if p.stem != "model"
    )
    # a file that docs/adding.md writes, with a test of its own
    written = re.compile(r"from \S*selective_scan import")
    texts += [text for found in shown for text in found if not written.search(text)]
    assert len(texts) > 20
    bodies = (
        f"def example_{i}() -> None:\n{textwrap.indent(text or 'pass', '    ')}\n"
        for i, text in enumerate(texts)
    )
    file.write_text("from simulator import *\n" + "".join(bodies), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    said, errors, status = api.run(
        [str(file), "--config-file=setup.cfg", "--disable-error-code=var-annotated"]
    )
    assert status == 0, said + errors


def test_the_typed_program_reaches_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    """mypy checks the program (setup.cfg, .ci/release), so it must be one that runs."""
    runpy.run_path(str(ROOT / ".ci/typed_program.py"), run_name="__main__")
    assert "Records" in capsys.readouterr().out


def test_names_that_are_missing_raise_and_names_that_exist_are_loaded_at_first_use() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod_hardware'"):
        simulator.lod_hardware  # type: ignore[attr-defined]  # noqa: B018
    loaded = (
        "import sys, simulator; print('numpy' in sys.modules, simulator.load_hardware.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "load_hardware"]


@pytest.fixture(scope="module")
def held() -> dict[str, Any]:
    """Public objects by the function that returns them."""
    hw, model = simulator.load_hardware("h100"), simulator.load_model("llama-3.2-1b")
    dense = simulator.lower(model, phase="decode", engine="hf")
    pruned = simulator.prune(dense, "width", sparsity=0.3)
    table = simulator.table(
        ["llama-3.2-1b"], ["h100", "a100"], ["depth", "semi_structured"], [0.25, 0.5]
    )
    advised = advise("llama-3.2-1b", ["h100"], 1.2, ["depth", "width"])
    detailed = simulator.GemmOptions(detail=True)
    return {
        "speedup": simulator.speedup(dense, pruned, hw),
        "waterfall": simulator.waterfall(dense, pruned, hw),
        "table": table,
        "record": table[0],
        "explanation": explanations("llama-3.2-1b", ["h100"], prune="depth 0.25")[0],
        "lower": dense,
        "gemm_time": simulator.gemm_time(
            [[1, 8, 64]], 4096, [[4096], [8192]], hw, options=detailed
        ),
        "attention_time": decode_time(1, 2048, 32, 8, 64, hw),
        "workload_time": simulator.workload_time(dense, hw),
        "memory": simulator.memory(dense, hw),
        "load_hardware": hw,
        "section": hw.section("gemm", "bf16"),
        "load_model": model,
        "load_engine": simulator.load_engine("hf"),
        "family": simulator.FAMILIES["width"],
        "method": simulator.METHODS["flap"],
        "advise": advised,
        "advice": advised.advice[0],
    }


ROWS = {
    "waterfall": 12,
    "table": 4,
    "gemm_time": 6,
    "section": 26,
    "lower": 16,
    "workload_time": 16,
}


@pytest.mark.quick
def test_what_people_hold_becomes_plain_values_a_data_frame_and_three_lines(
    held: dict[str, Any],
) -> None:
    pytest.importorskip("pandas")
    rows = {**ROWS, "advise": len(held["advise"].advice)}
    for name, one in held.items():
        assert isinstance(one, Displayed), name
        assert json.loads(json.dumps(one.to_dict(), allow_nan=False)), name
        frame = one.to_pandas()
        assert len(frame) == rows.get(name, 1), name
        assert len(repr(one)) <= 3 * 120, name
        assert "\n" not in repr(one), name
    s, w, t = held["speedup"], held["lower"], held["gemm_time"]
    assert s.to_dict()["efficiency"] == s.efficiency
    assert held["speedup"].to_pandas()["dense_s"][0] == s.dense_s
    assert w.to_dict()["role"] == w.to_pandas()["role"].tolist()
    assert w.to_pandas()["flops"].sum() == w.flops.sum()
    assert np.array_equal(t.to_dict()["seconds"], t.seconds)
    assert t.to_pandas()["bottleneck"].tolist() == t.bottlenecks.ravel().tolist()
    assert "tile_m" not in held["attention_time"].to_dict()
    assert held["table"].to_dict()["results"][0] == held["record"].to_dict()
    assert (
        list(held["table"].to_pandas().columns)
        == list(Result.__dataclass_fields__)
        == list(COLUMNS)
    )


@pytest.mark.quick
@pytest.mark.parametrize("phase", ["prefill", "decode", "generate", "serve"])
def test_plain_values_are_finite_also_where_nothing_is_pruned(phase: str) -> None:
    hw = simulator.load_hardware("h100")
    asked: dict[str, Any] = {"phase": phase, "new_tokens": 4, "engine": "hf", "seq": 64}
    found = simulator.table(
        ["llama-3.2-1b"], [hw], general_families(), [0.0, 0.5], batch=[1, 4], **asked
    )
    assert {0.0, 0.5} == {r.sparsity for r in found}
    nothing = [r for r in found if r.sparsity == 0.0]
    assert all(math.isnan(r.efficiency) and r.to_dict()["efficiency"] is None for r in nothing)
    new_tokens = 4 * (phase in ("generate", "serve"))
    dense = simulator.lower("llama-3.2-1b", phase=phase, seq=64, new_tokens=new_tokens)
    alone = simulator.Request(model="llama-3.2-1b", **asked)
    equal = [function(dense, dense, hw) for function in (simulator.speedup, simulator.waterfall)]
    explained = explanations("llama-3.2-1b", [hw], family="depth", sparsity=0.0, **asked)
    times = [
        simulator.workload_time(dense, hw),
        simulator.memory(dense, hw),
        runnable(alone, NOTHING, hw),
    ]
    for result in (found, *found, *equal, dense, *explained, *times):
        json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.quick
def test_without_pandas_one_line_says_what_to_install(
    held: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"a data frame needs .*pip install"):
        held["speedup"].to_pandas()
