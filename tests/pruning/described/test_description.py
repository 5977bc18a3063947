"""Method files: what they say is read, from YAML and from a mapping; all else is one line."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tables import tables_of

import simulator
from simulator.errors import InputError
from simulator.names import PHASES
from simulator.pruning._methods import Method
from simulator.pruning.described.description import (
    OPERATORS,
    Addition,
    ByLayer,
    Change,
    Description,
    LayerRange,
    PruneStep,
)
from simulator.pruning.described.expressions import Condition, Expression

HERE = Path(simulator.__file__).parent
PUBLISHED = sorted((HERE / "pruning" / "methods").glob("*.yaml"))

ROUTER = """\
method: router-mlp
what: channels of the MLP, by a router
arxiv: "2310.17157"
sparsities: [0.5, 0.75]
phases: [prefill, decode]
layers: "4:-2"
per_layer: s * layer / layers
prune:
  - width: {mlp: s, heads: 0.25}
    layers: 0-3,8
    align: 64
  - token: s
    per_layer: {geometric: 4}
  - kv_cache:
    budget: 1024
    rolling: true
dynamic:
  gate_up: {n: 1 - s, per: token, kernel: gather}
  down: {k: 1 - s, per: 16, shared: true, groups: 32, align: 8, layers: [0, 1, -1]}
  attention: {m: 0.5, keys: 0.25, block: 16, kv: pruned, tokens: exact, kernel: block-sparse}
  experts: {top_k: 1}
  cache: {budget: 2048, rolling: true}
adds:
  - gemm: {m: tokens, n: inner / 32, k: hidden, role: router, place: before mlp}
  - elementwise: {read: 2 * tokens, write: tokens, role: select, every: sublayer, when: tokens > 1}
  - time: {seconds: 9us, role: sort, every: pass, kernels: 2, phases: [decode]}
"""


@pytest.fixture
def of_text(tmp_path: Path) -> Any:
    def read(text: str) -> Description:
        (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
        return Description.read(tmp_path / "m.yaml")

    return read


pytestmark = pytest.mark.quick


def test_every_key_is_read(of_text: Any) -> None:
    e, layers = Expression.parse, LayerRange.parse
    assert of_text(ROUTER) == Description(
        name="router-mlp",
        what="channels of the MLP, by a router",
        arxiv="2310.17157",
        sparsities=(0.5, 0.75),
        phases=PHASES,
        layers=layers("4:-2"),
        per_layer=ByLayer((e("s * layer / layers"),)),
        prune=(
            PruneStep(
                "width",
                {"mlp": e("s"), "heads": e("0.25")},
                layers("0-3,8"),
                options={"align": 64},
            ),
            PruneStep("token", e("s"), per_layer=ByLayer(geometric=True, runs=4)),
            PruneStep("kv_cache", options={"budget": 1024, "rolling": True}),
        ),
        dynamic=(
            Change("gate_up", "n", e("1 - s"), "gather"),
            Change("down", "k", e("1 - s"), "dense", 16, True, 32, 8, layers=layers("0,1,-1")),
            *(
                Change(
                    *("attention", axis, e(share), "block-sparse"),
                    **{"tokens": "exact", "kv": "pruned", "block": 16},
                )
                for axis, share in (("m", "0.5"), ("keys", "0.25"))
            ),
            Change("experts", "top_k", e("1"), "dense"),
            Change("cache", "budget", e("2048"), "dense", rolling=True),
        ),
        adds=(
            Addition(
                *("gemm", "router", {"m": e("tokens"), "n": e("inner / 32"), "k": e("hidden")}),
                place="before mlp",
            ),
            Addition(
                *("elementwise", "select", {"read": e("2 * tokens"), "write": e("tokens")}),
                *("before sublayer", "sublayer"),
                when=Condition.parse("tokens > 1"),
            ),
            Addition(
                *("time", "sort", {"seconds": e("9e-06")}, "before layer", "pass", 2),
                phases=("decode",),
            ),
        ),
    )


def test_a_mapping_is_read_as_its_file(of_text: Any) -> None:
    found = of_text(ROUTER)
    assert Description.of(yaml.safe_load(ROUTER)) == found
    assert pickle.loads(pickle.dumps(found)) == found
    assert hash(found) == hash(of_text(ROUTER))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_methods_are_method_files(path: Path) -> None:
    found = Description.read(path)
    assert found == Description.of(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert found.name.replace(":", "-") == path.stem
    assert found.what
    assert found.needs_sparsity == bool(found.sparsities)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("4:-2", (4, 5)),
        ("1::3", (1, 4, 7)),
        (":2,-1", (0, 1, 7)),
        ("5, 2-3", (2, 3, 5)),
        (":", tuple(range(8))),
    ],
)
def test_layers_of_a_model_with_eight(text: str, numbers: tuple[int, ...]) -> None:
    assert LayerRange.parse(text).numbers(8) == numbers


@pytest.mark.parametrize("text", ["8", "0-8", "-9", "6:-2", "3-2", "4:9"])
def test_layers_that_a_model_lacks(text: str) -> None:
    with pytest.raises(InputError, match=f"layers {text}: expected some of 8 layers"):
        LayerRange.parse(text).numbers(8)


@pytest.mark.parametrize(("part", "needs"), tables_of("pruning/mistakes.yaml")["needs"])
def test_a_request_states_s_if_an_expression_has_it(part: dict[str, Any], needs: bool) -> None:
    assert Description.of({"method": "m", **part}).needs_sparsity == needs


@pytest.mark.parametrize(
    ("old", "new", "message"), tables_of("pruning/mistakes.yaml")["description"]
)
def test_what_is_not_understood_is_refused_by_name(
    old: str, new: str, message: str, of_text: Any
) -> None:
    assert old in ROUTER
    with pytest.raises(InputError, match=message):
        of_text(ROUTER.replace(old, new, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "m"}, "expected prune, dynamic or adds, got none of them"),
        (
            {"method": "m", "prune": [{"width": 0.5}], "sparsities": [0.5]},
            "sparsities: expected no",
        ),
        ({"method": "m", "dynamic": {"mlp": {"m": "0.5"}}, "layer": 1}, "^method: layer: unknown"),
        ({"method": "m", "prune": {(1, 2): 3}}, "expected a mapping of texts, numbers and lists"),
        ({"method": "m", "prune": [{"width": 0.5}], "per_layer": ["s"]}, "per_layer: expect"),
        ([], "expected some of method"),
    ],
)
def test_a_mapping_has_the_checks_of_a_file(content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Description.of(content)


def test_a_mapping_that_contains_itself_is_refused() -> None:
    content: dict[str, Any] = {"method": "m"}
    content["prune"] = [content]
    with pytest.raises(InputError, match="expected a mapping of texts"):
        Description.of(content)


WORDS = (
    *("s", "1 / 0", "-1", "1e400", "9" * 400, "0.5", "nan", "null", "true", "{}", "[]", "[[1]]"),
    *("{a: 1}", "tokens", '"', "'", ": ", "&a", "*a", "!!python/object:os.system", "%", "\t", "\0"),
    *("é", "\ud800", "geometric", "2:4", "- - - 1", "[" * 3000, "{a: " * 30, "a" * 1_000_000),
    *OPERATORS,
)


def mutated(text: str, dice: random.Random) -> str:
    """Return a file after some edits: lines, words and values are lost, copied, moved or new."""
    for _ in range(dice.randint(1, 4)):
        lines = text.split("\n")
        at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
        line = lines[at]
        places = [i for i, c in enumerate(line) if c in " :,{}[]"] or [0]
        first, last = sorted((dice.choice(places), dice.choice([*places, len(line)])))
        word = dice.choice(WORDS)
        edits = {
            "lost": [],
            "twice": [line, line],
            "another": [lines[other]],
            "shorter": [line[:first] + line[last:]],
            "replaced": [f"{line[:first]} {word}{line[last:]}"],
            "new value": [f"{line.partition(':')[0]}: {word}"],
            "moved": [" " * dice.randint(0, 6) + line.lstrip()],
        }
        lines[at : at + 1] = dice.choice(list(edits.values()))
        text = "\n".join(lines)
    return text


def refused(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the value of a function, None if it refuses its arguments in one line."""
    try:
        return function(*arguments)
    except InputError as error:
        assert str(error).isprintable()  # noqa: PT017
        return None


@pytest.mark.parametrize("many", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_files_have_an_answer_or_one_line(many: int, tmp_path: Path) -> None:
    dice, path, answers, longest = random.Random(50), tmp_path / "m.yaml", 0, 0.0
    texts = [ROUTER] * 9 + [file.read_text(encoding="utf-8") for file in PUBLISHED]
    dense = [simulator.lower("smollm2-135m", phase=p, batch=2, seq=64) for p in PHASES[:2]]
    for _ in range(many):
        content = mutated(dice.choice(texts), dice)
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        start = time.process_time()
        method = refused(Method.read, path)
        longest = max(longest, time.process_time() - start)
        if method is not None:
            sparsity = 0.5 if method.takes_sparsity else None
            pruned = refused(method.prune, dice.choice(dense), sparsity)
            answers += pruned is not None and bool(np.isfinite(pruned.flops).all())
    assert 0 < answers < many
    assert longest < 0.3  # measured: 0.03 s with the imports


def test_a_method_of_both_passes_is_one_of_every_phase() -> None:
    both = {"method": "m", "phases": ["decode", "prefill"], "dynamic": {"mlp": {"m": 0.5}}}
    assert Description.of(both).phases == PHASES
    assert Description.of({**both, "phases": ["decode"]}).phases == ("decode",)
