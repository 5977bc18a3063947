"""Method files say what dynamic families do: with ``dynamic:`` and ``adds:`` alone they give the
numbers of the families, and one method gives one answer however it is stated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import simulator
from simulator.files.yaml import Node, Problems, parse_yaml
from simulator.pruning import FAMILIES, prune_model
from simulator.pruning._templates import template

NUMBER = re.compile(r"[\d.]+")
NUMBERS = (
    *("dense_s", "dense_lower", "dense_upper", "pruned_s", "pruned_lower", "pruned_upper"),
    *("speedup", "speedup_lower", "speedup_upper", "flop_bound", "byte_bound", "roofline_bound"),
    *("realised_sparsity", "pruned_memory_bytes", "ttft_s", "tpot_s"),
)
REQUESTS: tuple[dict[str, Any], ...] = (
    {"model": "llama-3.1-8b", "engine": "vllm", "phase": "prefill", "seq": 4096, "batch": 2},
    {"model": "llama-3.1-8b", "engine": "hf", "phase": "decode", "seq": 8192, "batch": 8},
    {
        **{"model": "llama-3.1-8b", "engine": "trtllm", "phase": "generate", "seq": 2048},
        **{"batch": 4, "devices": 4, "new_tokens": 16},
    },
    {"model": "gemma-2-9b", "engine": "vllm", "phase": "serve", "seq": 6000, "batch": 8},
    {"model": "gemma-2-9b", "engine": "hf", "phase": "generate", "seq": 5000, "new_tokens": 8},
    {"model": "mistral-7b-v0.1", "engine": "vllm", "phase": "prefill", "seq": 9000, "devices": 2},
    {"model": "mistral-7b-v0.1", "engine": "trtllm", "phase": "decode", "seq": 600, "batch": 64},
)
# text of a family -> the kernel in its file; "" : no kernel and no added work, None: as it is
FILES = {
    "kv_cache": None,
    "sparse_attention": None,
    "token": None,
    "dynamic_depth kernel=ideal": "",
    "dynamic_depth kernel=gathered": "gather",
    "dynamic_depth": "masked",
    "dynamic_width kernel=ideal": "",
    "dynamic_width kernel=gathered": "gather",
    "dynamic_width": "grouped",
}


def content(text: str) -> dict[str, Any]:
    def plain(node: Node) -> Any:
        if node.kind == "mapping":
            return {key: plain(value) for key, (_, value) in node.entries.items()}
        if node.kind == "list":
            return [plain(item) for item in node.items]
        value = node.text if node.quoted or not NUMBER.fullmatch(node.text) else float(node.text)
        return {"true": True, "false": False}.get(value, value)

    root = parse_yaml(text, Problems("template"))
    assert root is not None
    found: dict[str, Any] = plain(root)
    return found


def described(family: str, kernel: str | None) -> dict[str, Any]:
    """Return the template of a family with another kernel."""
    found = content(template(family))
    if kernel is None or kernel == "gather":
        return found
    found.pop("adds")
    for operator, change in found["dynamic"].items():
        change.pop("kernel", None)
        if kernel and (kernel != "grouped" or operator != "attention"):
            change["kernel"] = kernel
    return found


def numbers(request: dict[str, Any], **pruning: Any) -> list[float]:
    (row,) = simulator.table(request["model"], "h100", **pruning, **_settings(request))
    return [getattr(row, name) or 0.0 for name in NUMBERS]  # some phases have no first token


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name != "model"}


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r['model']}-{r['phase']}")
@pytest.mark.parametrize("text", FILES)
def test_a_file_gives_the_numbers_of_its_family(text: str, request_: dict[str, Any]) -> None:
    family, _, options = text.partition(" ")
    method = simulator.Method.of(described(family, FILES[text]))
    for s in (0.25, 0.5, 0.7):
        of_family = numbers(request_, prune=f"{family} {s} {options}")
        of_file = numbers(request_, method=method, sparsity=s)
        assert of_file == pytest.approx(of_family, rel=1e-9)
        assert method.family == method.name != family


@pytest.mark.parametrize("request_", REQUESTS[:3], ids=lambda r: r["phase"])
def test_all_skips_whole_layers(request_: dict[str, Any]) -> None:
    router = {"m": "tokens", "n": 2, "k": "hidden", "role": "router"}
    whole = {"method": "whole", "dynamic": {"all": {"m": "1 - s", "kernel": "gather"}}}
    method = simulator.Method.of({**whole, "adds": [{"gemm": router}]})
    of_family = numbers(request_, prune="dynamic_depth 0.5 kernel=gathered unit=layer")
    assert numbers(request_, method=method, sparsity=0.5) == pytest.approx(of_family, rel=1e-9)


@pytest.mark.parametrize("family", ["kv_cache", "sparse_attention", "token", "dynamic_width"])
def test_nothing_changes_without_sparsity(family: str) -> None:
    """At s = 0 the dense rows remain; only the added work is left."""
    dense = simulator.lower("llama-3.1-8b", phase="generate", seq=1024, batch=2, new_tokens=4)
    method = simulator.Method.of(content(template(family)))
    pruned = method.prune(dense, 0.0)
    kept = pruned.take(~pruned.overhead)
    assert kept.expand().flops.tolist() == dense.expand().flops.tolist()
    assert kept.bytes.sum() == dense.bytes.sum()
    assert method.prune(dense, 0.0, ideal=True).bytes.sum() == dense.bytes.sum()


def test_pruning_and_lowering_commute_where_the_order_is_free() -> None:
    """A method that prunes widths and skips tokens is the pruned model, whose tokens skip."""
    both = simulator.Method.of(
        {
            "method": "both",
            "prune": [{"width": {"mlp": "s"}}],
            "dynamic": {"mlp": {"m": "1 - s"}},
        }
    )
    skips = simulator.Method.of({"method": "skips", "dynamic": {"mlp": {"m": "1 - s"}}})
    dense = simulator.lower("llama-3.1-8b", phase="prefill", seq=512)
    model = prune_model(simulator.load_model("llama-3.1-8b"), "width mlp=0.5")
    first = skips.prune(simulator.lower(model, phase="prefill", seq=512), 0.5)
    assert both.prune(dense, 0.5).flops.tolist() == first.flops.tolist()


def ways(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """Yield every way to state the method of a file at half."""
    path.write_text(text)
    yield {"prune": f"{path} s=0.5"}
    yield {"prune": f"{path} 0.5"}
    yield {"prune": f"{path} 50%"}
    yield {"method": str(path), "sparsity": 0.5}
    yield {"method": simulator.Method.read(path), "sparsity": 0.5}
    yield {"method": simulator.Method.of(content(text)), "sparsity": 0.5}


def test_every_way_to_state_a_method_gives_one_answer(tmp_path: Path, cli: Any) -> None:
    path, request = tmp_path / "mine.yaml", REQUESTS[0]
    first, *others = (numbers(request, **way) for way in ways(path, template("dynamic_depth")))
    assert all(other == first for other in others)
    options = "--hardware h100 --phase prefill --seq 4096 --batch 2"
    stated = [f"--method {path} --sparsity 0.5", f"--prune '{path} s=0.5'"]
    rows = [cli.json(f"speedup llama-3.1-8b {options} {one}")[0] for one in stated]
    assert [[row[name] or 0.0 for name in NUMBERS] for row in rows] == [pytest.approx(first)] * 2


@pytest.mark.parametrize("name", [*FAMILIES, *simulator.METHODS])
def test_a_template_is_a_method(name: str) -> None:
    """The file of a published method or family is one, with the families that it names."""
    method = simulator.Method.of(content(template(name)))
    assert method.name == (name if name in simulator.METHODS else f"my-{name.replace('_', '-')}")
    if name in simulator.METHODS:
        assert method.family == simulator.METHODS[name].family
    elif not FAMILIES[name].dynamic:
        assert method.family == name
