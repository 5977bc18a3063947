"""Shapes written as a config.json are read back as the same shapes, and a file keeps all that is not a shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simulator.errors import InputError
from simulator.models.architectures import ARCHITECTURES
from simulator.models.changes import changed_keys, content_of, write_config
from simulator.models.library import from_hf_config, list_models, load_model

pytestmark = pytest.mark.quick

PLAIN = [n for n in list_models() if not ((m := load_model(n)).blocks or m.experts or m.latent)]


@pytest.mark.parametrize("name", PLAIN)
def test_every_architecture_reads_back_what_is_written(name: str, tmp_path: Path) -> None:
    model, content = load_model(name), content_of(name)
    groups = max(1, model.kv_heads // 2)
    changes: list[dict[str, Any]] = [{"layers": 5, "windows": model.windows[:5]}, {"inner": 1024}]
    heads = {"kv_heads": groups, "heads": groups * (model.heads // model.kv_heads)}
    if ARCHITECTURES[model.architecture].grouped:  # heads and hidden size change independently
        changes += [heads, {"hidden": model.hidden // 2}]
    else:
        changes += [{"hidden": 4 * model.head_dim, "heads": 4, "kv_heads": 4}]
        with pytest.raises(InputError, match="cannot state num_attention_heads"):
            changed_keys(model, replace(model, heads=groups, kv_heads=groups), content)
    changes.append({key: value for change in changes for key, value in change.items()})
    for i, change in enumerate(changes):
        new = replace(model, **change)
        file = write_config(tmp_path / str(i), {**content, **changed_keys(model, new, content)})
        assert replace(load_model(file.parent), name=name) == new
    assert changed_keys(model, model, content) == {}


def test_a_file_keeps_what_is_no_shape_and_its_list_of_layers_is_cut(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention"] * 3
    content = {
        **{"model_type": "qwen2", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "rope_theta": 1e6},
        **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": types},
        **{"use_sliding_window": True, "sliding_window": 32, "architectures": ["Qwen2ForCausalLM"]},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert content_of(file) == content_of(str(tmp_path)) == content
    model = load_model(file)
    new = replace(model, layers=3, windows=model.windows[:3])
    assert changed_keys(model, new, content) == {"num_hidden_layers": 3, "layer_types": types[:3]}
    written = write_config(tmp_path / "new", {**content, **changed_keys(model, new, content)})
    assert json.loads(written.read_text()) == {**content, "num_hidden_layers": 3, "layer_types": types[:3]}
    assert load_model(written).windows == (0, 32, 0)


def test_no_file_of_other_content_is_written_over(tmp_path: Path) -> None:
    content = dict(content_of("llama-3.2-1b"))
    file = write_config(tmp_path, content)
    assert write_config(tmp_path, content) == file
    before = file.read_bytes()
    with pytest.raises(InputError, match="exists with different content"):
        write_config(tmp_path, {**content, "num_hidden_layers": 3})
    assert file.read_bytes() == before
    (tmp_path / "link").mkdir()
    (tmp_path / "link/config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError):
        write_config(tmp_path / "link", content)
    assert not (tmp_path / "elsewhere.json").exists()
    with pytest.raises(InputError, match="expected a folder"):
        write_config(file / "below", content)
    with pytest.raises(InputError, match="cannot hold"):
        write_config(tmp_path / "infinite", {**content, "rope_theta": float("inf")})


def test_shapes_made_in_python_have_no_file() -> None:
    assert content_of(replace(load_model("llama-3.2-1b"), inner=4096)) == {}
    tiny = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2, "vocab_size": 10}
    assert content_of(tiny) == tiny
    assert content_of(load_model("opt-13b")) == content_of("facebook/opt-13b")
    assert from_hf_config(content_of("opt-13b"), name="opt-13b") == load_model("opt-13b")
