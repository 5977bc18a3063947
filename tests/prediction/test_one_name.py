"""Two engines or models of one name, whose rows could not be told apart, are rejected with both
paths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import simulator
from simulator.errors import InputError
from simulator.models.library import FOLDER
from simulator.prediction.advise import advise
from simulator.prediction.explain import explanations
from simulator.prediction.sweep import Grid

pytestmark = pytest.mark.quick

ENGINE = Path(simulator.__file__).parent / "engines" / "hf.yaml"


@pytest.fixture
def engines(tmp_path: Path) -> list[str]:
    """Files of two engines of one name, of which one has a slower host."""
    text, paths = ENGINE.read_text(encoding="utf-8"), [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    paths[0].write_text(text, encoding="utf-8")
    paths[1].write_text(text.replace("pass: {value: 1 ms", "pass: {value: 3 ms"), encoding="utf-8")
    return list(map(str, paths))


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Folders of two models of one name, of which one has fewer layers."""
    content, paths = json.loads((FOLDER / "llama-3.2-1b.json").read_text(encoding="utf-8")), []
    for name, layers in (("a", 14), ("b", 12)):
        (tmp_path / name).mkdir()
        own = content | {"_name_or_path": "my/tiny", "num_hidden_layers": layers}
        (tmp_path / name / "config.json").write_text(json.dumps(own))
        paths.append(str(tmp_path / name))
    return paths


def grid(models: list[str], engines: list[str]) -> Grid:
    return Grid(tuple(models), ("h100",), (0.25,), ("decode",), (1,), (64,), engines=tuple(engines))


ONE = {"prune": "depth 0.25"}
OF_ENGINES: dict[str, Callable[[list[str]], Any]] = {
    "table": lambda e: simulator.table("llama-3.2-1b", "h100", engine=e, **ONE),
    "serve": lambda e: simulator.serve("llama-3.2-1b", "h100", engine=e, **ONE),
    "advise": lambda e: advise("llama-3.2-1b", ["h100"], 1.3, engine=e),
    "explanations": lambda e: explanations("llama-3.2-1b", ["h100"], engine=e, **ONE),
    "sweep": lambda e: grid(["llama-3.2-1b"], e),
}
OF_MODELS: dict[str, Callable[[list[str]], Any]] = {
    "table": lambda m: simulator.table(m, "h100", **ONE),
    "sweep": lambda m: grid(m, ["hf"]),
}


@pytest.mark.parametrize("call", OF_ENGINES)
def test_two_engines_of_one_name_are_rejected(engines: list[str], call: str) -> None:
    with pytest.raises(InputError) as error:
        OF_ENGINES[call](engines)
    expected = (
        f"engine: {engines[0]} and {engines[1]}: two engines are called hf; rename one of them"
    )
    assert str(error.value) == expected


@pytest.mark.parametrize("call", OF_MODELS)
def test_two_models_of_one_name_are_rejected(models: list[str], call: str) -> None:
    with pytest.raises(InputError) as error:
        OF_MODELS[call](models)
    assert (
        str(error.value)
        == f"model: {models[0]} and {models[1]}: two models are called tiny; rename one of them"
    )


def test_pruned_models_of_one_name_are_named_after_their_folders(models: list[str]) -> None:
    found = simulator.table("llama-3.2-1b", "h100", pruned=models)
    assert [r.pruned for r in found] == ["a", "b"]
    assert [r.pruned for r in simulator.table("llama-3.2-1b", "h100", pruned=models[:1])] == [
        "tiny"
    ]


def test_one_engine_or_model_by_two_names_counts_once(
    engines: list[str], models: list[str]
) -> None:
    Path(engines[1]).write_text(Path(engines[0]).read_text())
    config = str(Path(models[0]) / "config.json")
    found = simulator.table([models[0], config], "h100", engine=[*engines, "vllm"], **ONE)
    assert [(r.model, r.engine) for r in found] == [("tiny", "hf"), ("tiny", "vllm")]
    with_versions = simulator.table("llama-3.2-1b", "h100", engine=["vllm", "vllm@0.8"], **ONE)
    assert [r.engine for r in with_versions] == ["vllm", "vllm@0.8"]
