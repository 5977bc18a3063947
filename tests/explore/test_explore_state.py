"""The page's state: its query says all of it, bad queries are named and replaced, a dropped config.json fits in it."""

from __future__ import annotations

import base64
import json
import string
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator.models.library
from simulator.engines.engine import list_engines
from simulator.errors import InputError
from simulator.explore.dropped import MOST_TOKEN, PREFIX, read_token, token
from simulator.explore.state import KEYS, MOST_QUERY, State, read_query, strict_query, to_query
from simulator.hardware.library import list_hardware
from simulator.models.huggingface import MAX_FILE_BYTES
from simulator.models.library import list_models, load_model
from simulator.pruning import FAMILIES
from simulator.workload import DTYPES, PHASES

# fmt: off
TINY: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000, "torch_dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
}
# fmt: on

SHIPPED = sorted(Path(simulator.models.library.__file__).parent.glob("*.json"))

fractions = st.floats(0.0, 0.999, allow_nan=False)
states = st.builds(
    State,
    model=st.sampled_from([*list_models(), token(json.dumps(TINY), "tiny.json")]),
    gpus=st.lists(st.sampled_from(list_hardware()), min_size=1, max_size=4, unique=True).map(tuple),
    families=st.lists(st.sampled_from(list(FAMILIES)), min_size=1, unique=True).map(tuple),
    sparsities=st.lists(fractions, min_size=1, max_size=9, unique=True).map(tuple),
    phase=st.sampled_from(PHASES),
    batch=st.integers(1, 4096),
    seq=st.integers(1, 100_000),
    new_tokens=st.integers(1, 1024),
    engine=st.sampled_from(list_engines()),
    dtype=st.sampled_from(DTYPES),
    detail=st.sampled_from(list(FAMILIES)),
    at=fractions,
    dense_ms=st.none() | st.floats(1e-6, 1e8),
    versus=st.sampled_from(["", *list_engines()]),
)


@given(states)
@settings(max_examples=200, deadline=None)
def test_a_query_says_all_of_a_state(state: State) -> None:
    assert read_query("?" + to_query(state)) == (state, ())
    assert strict_query(to_query(state)) == state


@given(st.text(max_size=200), st.sampled_from(list(KEYS)), st.text())
@settings(max_examples=300, deadline=None)
def test_any_query_and_any_value_give_a_state(text: str, key: str, value: str) -> None:
    state, problems = read_query(text)
    assert isinstance(state, State)
    assert all(line.isprintable() for line in problems)
    state, problems = read_query(f"{key}={quote(value)}")
    assert len(problems) <= 1
    assert not problems or state == State()


@pytest.mark.parametrize(
    ("query", "says", "instead"),
    [
        ("model=gpt-5", "model 'gpt-5' is unknown", "shown with llama-3.1-8b"),
        ("model=.%2Fconfig.json", "is unknown", "shown with llama-3.1-8b"),
        ("model=dropped:zzz", "not a dropped config.json that can be read", "shown with llama-3.1-8b"),
        ("gpu=h10", "GPU 'h10' is unknown; did you mean", "shown with h100_sxm"),
        ("gpu=.%2Fmine.yaml", "is unknown", "shown with h100_sxm"),
        ("gpu=", "gpu: expected at least one", "shown with h100_sxm"),
        ("family=depht", "did you mean depth", "shown with depth, width"),
        ("family=", "family: expected at least one", "shown with depth, width"),
        ("sparsity=0.1,a", "sparsity 'a': expected a number", "shown with 0.1, 0.2"),
        ("sparsity=25", "for 25 % write 0.25", "shown with 0.1, 0.2"),
        ("sparsity=nan", "expected a fraction in [0, 1)", "shown with 0.1, 0.2"),
        ("at=1", "sparsity 1: expected a fraction in [0, 1)", "shown with 0.5"),
        ("phase=prefil", "did you mean prefill", "shown with prefill"),
        ("batch=0", "batch 0: expected a whole number from 1", "shown with 1"),
        ("batch=1.5", "batch '1.5': expected a whole number", "shown with 1"),
        ("batch=1&batch=2", "batch: given 2 times, expected once", "shown with 1"),
        ("seq=" + "9" * 400, "expected a whole number", "shown with 2048"),
        ("new=100000", "new 100000: expected a whole number from 1 to 1024", "shown with 128"),
        ("engine=vlm", "engine 'vlm' is unknown; did you mean vllm?", "shown with vllm"),
        ("engine=.%2Fmine.yaml", "is unknown", "shown with vllm"),
        ("versus=.%2Fmine.yaml", "is unknown", "shown with none"),
        ("dense=slow", "dense 'slow': expected a number", "shown with none"),
        ("dense=-1", "dense -1.0: expected a positive number of milliseconds", "shown with none"),
        ("dense=nan", "dense nan: expected a positive number of milliseconds", "shown with none"),
        ("dtype=bf17", "did you mean bf16", "shown with bf16"),
        ("batch=2147483647", "expected at most 2147483647 tokens in a pass", "shown with 1"),
        ("colour=red", "key 'colour' is unknown", "left out"),
        ("x" * (MOST_QUERY + 1), "longer than", "shown with the defaults"),
    ],
)
def test_what_is_bad_is_named_and_replaced(query: str, says: str, instead: str) -> None:
    state, (line,) = read_query(query)
    assert says in line
    assert instead in line
    assert state == State()
    with pytest.raises(InputError):
        strict_query(query)


def test_one_bad_value_leaves_the_others_and_keys_of_lists_may_repeat() -> None:
    state, problems = read_query("?phase=decode&batch=x&gpu=a100,4090&seq=512")
    assert state == State(phase="decode", gpus=("a100_sxm_80gb", "rtx_4090"), seq=512)
    assert len(problems) == 1
    assert read_query("gpu=a100&gpu=h100&family=depth&family=width")[0].gpus == ("a100_sxm_80gb", "h100_sxm")


@pytest.mark.parametrize(
    "bad", [{"gpus": ()}, {"families": ()}, {"sparsities": ()}, {"families": ("x",)}, {"sparsities": (0.01,) * 26}]
)
def test_a_state_is_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        State(**bad)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_dropped_model_is_the_one_its_file_describes(file: Path) -> None:
    made = token(file.read_text(), file.name)
    assert len(made) < MOST_TOKEN
    assert read_token(made) == (file.name, load_model(file))
    assert State(model=made).load() == load_model(file)


def test_a_token_carries_shape_keys_only() -> None:
    secret = {**TINY, "auto_map": {"AutoModel": "evil.py"}, "quantization_config": {"x": ["y" * 1000]}}
    packed = token(json.dumps(secret), "tiny.json").removeprefix(PREFIX)
    raw = zlib.decompress(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
    assert b"evil" not in raw
    assert token(json.dumps(secret), "tiny.json") == token(json.dumps(TINY), "tiny.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "c.json:1:2: is not JSON"),
        ("[1]", "expected a JSON object"),
        ("NaN", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps({**TINY, "hidden_size": "wide"}), "c.json: hidden_size: expected an integer"),
        (json.dumps({**TINY, "model_type": "mamba"}), "c.json: model_type: architecture 'mamba' is not supported"),
        (json.dumps({k: v for k, v in TINY.items() if k != "vocab_size"}), "c.json: vocab_size: missing"),
        (json.dumps({**TINY, "pad": "x" * MAX_FILE_BYTES}), "larger than 1000000 bytes"),
    ],
)
def test_a_bad_config_is_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        token(text, "/home/someone/c.json")
    assert says in str(caught.value)
    assert "/home" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_token_cannot_unpack_without_end() -> None:
    bomb = zlib.compress(json.dumps({"file": "a", "config": {"x": "y" * 3_000_000}}).encode(), 9)
    text = PREFIX + base64.urlsafe_b64encode(bomb).decode().rstrip("=")
    assert len(text) < MOST_TOKEN
    with pytest.raises(InputError, match="not a dropped config"):
        read_token(text)


@given(st.text(alphabet=f"{string.ascii_letters}{string.digits}-_=", max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_token_is_read_or_refused(text: str) -> None:
    with pytest.raises(InputError):
        read_token(PREFIX + text)
