"""A key given twice is rejected by name in every JSON file that users give."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from simulator.errors import InputError
from simulator.files.read import MOST_CONTAINERS, parse_bounded, parse_json
from simulator.models.library import load_model
from simulator.prediction.benchmarks import read_benches
from simulator.prediction.quality import read_results

pytestmark = pytest.mark.quick

CONFIG = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 2, "vocab_size": 10}


def twice(content: dict[str, object], key: str) -> str:
    """The JSON of an object with one key again at its end."""
    return f"{json.dumps(content)[:-1]}, {json.dumps(key)}: 4}}"


def test_a_key_given_twice_is_named() -> None:
    assert parse_json('{"a": {"b": 1}, "b": [{"a": 2}]}', "x") == {"a": {"b": 1}, "b": [{"a": 2}]}
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 0, "\\u0061": 2}}]'):
        with pytest.raises(
            InputError,
            match=r"^x: key 'a': expected once in an object, got twice or more; keep one$",
        ):
            parse_json(text, "x")


def test_files_of_users_with_a_key_twice_are_rejected(tmp_path: Path) -> None:
    config, result = tmp_path / "config.json", tmp_path / "results_1.json"
    config.write_text(twice(CONFIG, "hidden_size"))
    with pytest.raises(InputError, match=r"config\.json: key 'hidden_size': expected once"):
        load_model(config)
    result.write_text(twice({"results": {}, "avg_latency": 1.0}, "results"))
    with pytest.raises(
        InputError, match=r"results: .*results_1\.json: key 'results': expected once"
    ):
        read_results(tmp_path, "results_1.json")
    with pytest.raises(InputError, match=r"results_1\.json: key 'results': expected once"):
        read_benches(result)


def test_values_are_read_and_not_a_number_too() -> None:
    found = parse_bounded(b'\xef\xbb\xbf {"a": [1, 2.5, null, "x"], "b": {}}', "own", 1000)
    assert found == {"a": [1, 2.5, None, "x"], "b": {}}
    assert math.isnan(parse_bounded(b"NaN", "own", 10))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"own:1:1: is not JSON"),
        (b'{"a": \n 1', r"own:2:3: is not JSON"),
        (b"\xff\xfe", r"own: is not UTF-8 text \(byte 0\)"),
        (b'{"a": 1, "a": 2}', r"own: key 'a': expected once in an object"),
        (b"[" * 100_000 + b"]" * 100_000, r"own: is not read: too many levels"),
        (
            b"[" + b"[]," * (MOST_CONTAINERS + 1) + b"1]",
            r"own: expected at most 300,000 objects and lists",
        ),
        (b"[" + b"9" * 5000 + b"]", r"own: is not read \(Exceeds the limit"),
        (b"[" * 50_000_000, r"own: is larger than 20 MB; expected a smaller file"),
    ],
)
def test_other_texts_are_rejected_in_one_line(content: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"^{reason}") as error:
        parse_bounded(content, "own", 20_000_000)
    assert len(str(error.value)) < 300
