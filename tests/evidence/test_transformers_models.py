"""What prunesim reads of configurations is what Transformers builds, by a record of what it built."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from calibration.evidence import models
from calibration.evidence.models import Built, Comparison
from calibration.evidence.pages import DOCS
from simulator.models.architectures import REFUSED
from simulator.models.traced import TracedProduct, causal_types

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def recorded() -> dict[str, Built]:
    return {f"{b.case.name} {b.case.source}": b for b in models.recorded()}


@pytest.fixture(scope="module")
def compared(recorded: dict[str, Built]) -> list[Comparison]:
    return [models.compare(built) for built in recorded.values()]


@pytest.mark.quick
def test_no_configuration_is_read_as_another_model(compared: list[Comparison]) -> None:
    assert not [(c.case.name, c.result, c.lines) for c in compared if c.kind == "different"]


@pytest.mark.quick
def test_the_page_states_the_results(compared: list[Comparison]) -> None:
    page = (DOCS / "models.md").read_text("utf-8")
    stated = [table for table in models.page_tables(compared) if f"{table}\n" not in page]
    assert not stated, "run python -m calibration.evidence pages models"


def changed(built: Built, **changes: object) -> Built:
    """Return what Transformers built with another first layer."""
    assert built.traced is not None
    first, *others = built.traced.layers
    layers = (replace(first, **changes), *others)
    return replace(built, traced=replace(built.traced, layers=layers))


@pytest.mark.quick
def test_differences_are_found_and_named(recorded: dict[str, Built]) -> None:
    llama = recorded["llama defaults"]
    assert llama.traced is not None
    first = llama.traced.layers[0]
    q, *others = first.products
    other = models.compare(changed(llama, products=(replace(q, n=q.n + 128), *others)))
    assert other.result == "products differ"
    assert "layers 0:" in other.lines
    assert any("self_attn.q_proj n=4,224 k=4,096" in line for line in other.lines)
    more = models.compare(changed(llama, parameters=first.parameters + 3))
    assert more.result == "parameters differ by -3"
    assert more.lines == ("layers 0: parameters -3 each",)
    k, v = others[:2]
    fused = TracedProduct("qkv", q.n + k.n + v.n, q.k)
    assert models.compare(changed(llama, products=(fused, *others[2:]))).result == "exact, fused"


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "gpt_oss", "llama4_text", "dbrx", "zamba", "gemma3", "longcat_flash"]
)
def test_the_installed_transformers_builds_what_is_read(
    recorded: dict[str, Built], kind: str
) -> None:
    """What it builds is not compared with the record: each release may change it, as 5.25 did."""
    built = models.build(recorded[f"{kind} defaults"].case)
    assert models.compare(built).kind in ("exact", "different for a known reason")


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_refused_types_are_types_of_transformers() -> None:
    assert causal_types() >= REFUSED.keys()


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_a_file_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from calibration.evidence.command import main

    file = tmp_path / "config.json"
    content = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}
    sizes = {"num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 1000}
    file.write_text(json.dumps(content | sizes))
    assert main(["models", str(file)]) == 0
    assert "exact (197," in capsys.readouterr().out
    file.write_text(json.dumps({"model_type": "no_such_type"}))
    assert main(["models", str(file)]) == 0
    assert "no decoder of Transformers" in capsys.readouterr().out
