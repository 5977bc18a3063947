"""The page's state: its query says all of it, bad queries are named and replaced, a dropped config.json fits in it."""

from __future__ import annotations

import base64
import json
import re
import string
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import save_shards, tensors_of

import simulator.models.library
from simulator.engines.engine import list_engines
from simulator.errors import InputError
from simulator.explore.address import KEYS, MOST_QUERY, read_problems, read_query, strict_query, to_query
from simulator.explore.dropped import MOST_TOKEN, PREFIX, Sent, profile_token, read_profile, read_token, take, token
from simulator.explore.state import ARITHMETIC, AXES, EXISTING, MOST_PASSES, State
from simulator.hardware.library import hardware_from_text, list_hardware, load_hardware, profiles_folder
from simulator.models.huggingface import MAX_FILE_BYTES, from_file, from_hf_config
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

OWN = (profiles_folder() / "rtx_3090.yaml").read_text().replace("name: rtx_3090", "name: h100_sxm")
OWN = "".join(line for line in OWN.splitlines(keepends=True) if not line.startswith("aliases:"))
"""A profile by the name of another one."""

SHIPPED = sorted(Path(simulator.models.library.__file__).parent.glob("*.json"))

OTHER = profile_token(OWN.replace("name: h100_sxm", "name: mine"), "mine.yaml")

TEXTS = ("width mlp=0.3 heads=0.2 layers=0,5-7", "depth 0.25 + low_rank 40%", "shortgpt 0.25", "snapkv-1024")

fractions = st.floats(0.0, 0.999, allow_nan=False)
states = st.builds(
    State,
    model=st.sampled_from([*list_models(), token(json.dumps(TINY), "tiny.json")]),
    gpus=st.lists(st.sampled_from([*list_hardware(), OTHER]), min_size=1, max_size=4, unique=True).map(tuple),
    families=st.lists(st.sampled_from(list(FAMILIES)), min_size=1, unique=True).map(tuple),
    sparsities=st.lists(fractions, min_size=1, max_size=9, unique=True).map(tuple),
    phase=st.sampled_from(PHASES),
    batch=st.integers(1, 4096),
    seq=st.integers(1, 100_000),
    new_tokens=st.integers(1, 1024),
    engine=st.sampled_from(list_engines()),
    dtype=st.sampled_from(ARITHMETIC),
    weights=st.sampled_from(["", *DTYPES]),
    devices=st.integers(1, 64),
    pruned=st.sampled_from(["", token(json.dumps(TINY | {"num_hidden_layers": 3}), "small.json")]),
    detail=st.sampled_from([*FAMILIES, EXISTING, *TEXTS]),
    prune=st.lists(st.sampled_from(TEXTS), max_size=3).map(tuple),
    over=st.sampled_from(list(AXES)),
    at=fractions,
    dense_ms=st.none() | st.floats(1e-6, 1e8),
    ttft_ms=st.none() | st.floats(1e-6, 1e8),
    tpot_ms=st.none() | st.floats(1e-6, 1e8),
    price=st.none() | st.floats(1e-6, 1e6),
    versus=st.sampled_from(["", *list_engines()]),
)
with_pin = st.builds(lambda state, pin: replace(state, pin=pin), states, st.none() | states)


@given(with_pin.filter(lambda state: max(one.passes for one in (state, state.pin) if one) <= MOST_PASSES))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_query_says_all_of_a_state(state: State) -> None:
    assert read_query("?" + to_query(state)) == (state, ())
    assert strict_query(to_query(state)) == state


@given(st.text(max_size=200), st.sampled_from(list(KEYS)), st.text())
@settings(max_examples=150, deadline=None)
def test_any_query_and_any_value_give_a_state(text: str, key: str, value: str) -> None:
    state, problems = read_query(text)
    assert isinstance(state, State)
    assert all(line.isprintable() for line in problems)
    state, problems = read_query(f"{key}={quote(value)}")
    assert strict_query(to_query(state)) == state
    assert all(line.isprintable() for line in problems)
    if key in ("prune", "pin"):  # a line for each wrong text or key; the others are kept
        assert len(problems) <= 1 + len(re.split("[;\n\r&]", value))
    else:
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
        ("ttft=0", "ttft 0.0: expected a positive number of milliseconds", "shown with none"),
        ("tpot=fast", "tpot 'fast': expected a number", "shown with none"),
        ("price=-2", "price: expected a positive price per GPU-hour, such as 2.5, got -2.0", "shown with none"),
        ("prune=width 0.3 mlp=", "pruning 'width 0.3 mlp=', column 14: expected NAME=VALUE or a fraction", "ignored"),
        ("prune=widht 0.3", "column 1: family or method 'widht' is unknown; did you mean width", "ignored"),
        ("prune=.%2Fplan.yaml", "prune './plan.yaml': the page opens no files; use prunesim report", "ignored"),
        ("prune=" + ";".join(f"depth 0.{i}" for i in range(1, 10)), "prune: expected at most 8 of them, got 9", "none"),
        ("prune=depth 0.5 " + "x" * 3000, "expected at most 2000 characters", "ignored"),
        ("detail=plan.yaml", "prune 'plan.yaml': the page opens no files", "shown with width"),
        ("detail=widht", "family or method 'widht' is unknown; did you mean width", "shown with width"),
        ("over=phase", "axis 'phase' is unknown", "shown with batch"),
        ("pin=batch%3D0", "pin: batch 0: expected a whole number", "shown with none"),
        ("pin=prune%3Dx.yaml", "pin: prune 'x.yaml': the page opens no files", "shown with none"),
        ("pin=" * 5000, "pin: key 'pin' is unknown", "shown with none"),
        ("dtype=bf17", "did you mean bf16", "shown with bf16"),
        ("weights=int5", "weights 'int5' is unknown", "shown with none"),
        ("devices=0", "devices 0: expected a whole number from 1 to 1024", "shown with 1"),
        ("pruned=.%2Fpruned", "pruned './pruned': expected the token of dropped files", "shown with none"),
        ("gpu=dropped:zzz", "not a dropped profile that can be read", "shown with h100_sxm"),
        ("gpu=h100," + profile_token(OWN, "own.yaml"), "two profiles are called h100_sxm", "shown with h100_sxm"),
        ("batch=2147483647", "expected at most 2147483647 tokens in a pass", "shown with 1"),
        ("colour=red", "key 'colour' is unknown", "ignored"),
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
    state, (line,) = read_query("prune=width mlp=30%25%0Adepth layers=0,5; width 2&prune=shortgpt 0.25")
    assert state.prune == ("width mlp=0.3", "depth layers=0,5", "shortgpt 0.25")
    assert "'width 2', column 7" in line


@pytest.mark.parametrize(
    "bad",
    [
        {"prune": ("depth",)},
        {"over": "x"},
        {"pin": State(pin=State())},
        {"detail": "x"},
        {"gpus": ()},
        {"families": ()},
        {"sparsities": ()},
        {"families": ("x",)},
        {"sparsities": (0.01,) * 26},
    ],
)
def test_a_state_is_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        State(**bad)


def test_a_format_of_weights_is_that_of_the_weights() -> None:
    state, (line,) = read_query("dtype=int4&phase=decode")
    assert (state.dtype, state.weights) == ("bf16", "int4")
    assert "no device computes in it" in line
    assert State(weights="fp8_block").scenario.dtype == "fp8", "no kernels compute 16 bits with such weights"


def test_a_profile_is_the_one_that_was_given_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "h100.yaml"
    path.write_text(OWN)
    dropped = profile_token(OWN, "h100.yaml")
    assert read_query(f"gpu={path}")[0] == State(), "no address makes the server read a file"
    given, problems = read_query(f"gpu={path}", [str(path)])
    assert problems == ()
    shipped = load_hardware("rtx_3090")
    for state in (given, State(gpus=(dropped,))):
        (profile,) = state.profiles
        assert profile.name == "h100_sxm"
        assert (profile.rates, profile.bandwidth_bytes_per_s) == (shipped.rates, shipped.bandwidth_bytes_per_s)


ALL_GPUS, ALL_FAMILIES = ",".join(list_hardware()), ",".join(FAMILIES)
FINE = ",".join(f"{i / 100}" for i in range(25))
LISTED = ";".join(f"width mlp=0.{i} layers=1-20" for i in range(1, 9))


@pytest.mark.parametrize(
    ("query", "replaced"),
    [
        (f"phase=generate&new=1024&gpu={ALL_GPUS}", ["new"]),
        (f"phase=generate&new=1024&prune={quote(LISTED)}", ["new"]),
        ("phase=generate&new=1024&model=nemotron-super-49b", ["new"]),
        (f"gpu={ALL_GPUS}&family={ALL_FAMILIES}&sparsity={FINE}", ["sparsity"]),
        (f"phase=generate&gpu={ALL_GPUS}&family={ALL_FAMILIES}&sparsity={FINE}", ["sparsity", "family"]),
    ],
)
def test_work_that_takes_long_is_replaced(query: str, replaced: list[str]) -> None:
    state, problems = read_problems(query)
    assert [problem.key for problem in problems] == replaced
    assert state.passes <= MOST_PASSES
    first = problems[0].line
    assert re.match(rf"{replaced[0]}: expected at most 400,000 passes to compute, got [\d,]+; select fewer GPUs", first)
    assert "; shown with " in first
    pinned, problems = read_problems(f"pin={quote(query)}")
    assert pinned.pin is None
    assert f"pin: {replaced[0]}: expected at most" in problems[0].reason


@pytest.mark.parametrize(
    "query",
    [
        f"gpu={ALL_GPUS}",
        f"phase=generate&gpu={ALL_GPUS}",
        "phase=generate&new=1024",
        f"family={ALL_FAMILIES}&sparsity={FINE}&phase=generate",
        f"prune={quote(LISTED)}&versus=hf&gpu=h100,a100",
    ],
)
def test_usual_work_is_not_replaced(query: str) -> None:
    assert read_problems(query)[1] == []


@pytest.mark.quick
@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("&".join(f"k{i}=" for i in range(4000)), "address: expected at most 100 keys, got 4000"),
        (f"prune={';'.join('xyz' for _ in range(7000))}", "prune: expected at most 8 of them, got 7000"),
        (f"pin=prune%3D{'%3B'.join('xyz' for _ in range(3000))}", "pin: prune: expected at most 8 of them"),
        (f"gpu={','.join(f'g{i}' for i in range(4000))}", "gpu: expected at most 100 values, got 4000"),
    ],
)
def test_values_are_counted_before_they_are_read(query: str, says: str) -> None:
    """The error of a single value would name it, with the closest names: a tenth of a millisecond each."""
    _, problems = read_problems(query)
    assert [problem.reason.startswith(says) for problem in problems] == [True]


@pytest.mark.quick
def test_repeated_values_are_read_once() -> None:
    assert read_problems(f"gpu={'h100,' * 5000}") == (State(), [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (OWN.replace("82,", "many,"), "p.yaml:14:21: datasheet.sm_count.value: expected"),
        (OWN + "stacks_of: h10\n", "p.yaml: stacks_of: profile 'h10' is unknown"),
        ("", "p.yaml:1:1: file: is empty"),
        (OWN + "\ud800: 1\n", "p.yaml:37:1: ?: unknown key"),
        ("&a [*a]", "anchors (&) and aliases (*) are not allowed"),
        ((profiles_folder() / "cpu.yaml").read_text(), "expected a profile without arrays"),
        ((profiles_folder() / "h100_sxm.vllm.yaml").read_text(), "expected a profile, got the sections of one stack"),
        ("#" * 60_001, "p.yaml: larger than 60000 bytes; expected a hardware profile"),
    ],
)
def test_a_bad_profile_is_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        take([Sent("p.yaml", text)])
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_profile_with_numbers_of_its_own_borrows_those_of_a_sibling() -> None:
    token = profile_token(OWN + "stacks_of: a100_sxm_80gb\n", "mine.yaml")
    assert read_profile(token)[1].stacks.keys() == load_hardware("a100_sxm_80gb").stacks.keys()


def files_of(folder: Path) -> list[Sent]:
    """Files of a checkpoint as the page sends them."""
    out = []
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        size = 8 + int.from_bytes(raw[:8], "little") if path.suffix == ".safetensors" else 0
        out.append(Sent(f"{folder.name}/{path.name}", raw[8 if size else 0 : size or None].decode(), len(raw) - size))
    return out


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A pruned tiny model in two shards: its config.json says the widths of the dense one."""
    folder = tmp_path / "pruned"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    model = replace(from_hf_config(TINY), inner=704)
    save_shards(folder, tensors_of(model), 2)
    return folder


def test_a_dropped_checkpoint_is_the_one_its_headers_describe(checkpoint: Path) -> None:
    kind, made = take(files_of(checkpoint))
    assert kind == "model"
    assert read_token(made) == ("pruned", load_model(checkpoint))
    assert len(made) < 1000
    anonymous = [Sent(Path(f.name).name, f.text, f.room) for f in files_of(checkpoint)]
    assert read_token(take(anonymous)[1])[0] == ".", "its folder is not known"
    lone = [f for f in anonymous if f.name != "model.safetensors.index.json"]
    assert read_token(take(lone)[1])[1].inner == 704, "an index is not needed"


def test_layers_that_all_differ_still_fit_in_an_address() -> None:
    dense = load_model("llama-3.1-70b")
    blocks = tuple(replace(b, inner=128 * (100 + (i * 37) % 101)) for i, b in enumerate(dense.layout))
    model = replace(dense, blocks=blocks)
    config = (Path(simulator.models.library.__file__).parent / "llama-3.1-70b.json").read_text()
    assert read_token(token(config, "x/config.json", tensors_of(model)))[1].blocks == blocks


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: files[1:], "3 files: expected one config.json, with or without the *.safetensors of its folder"),
        (lambda files: files[-1:], "model.safetensors.index.json: expected the config.json of its folder too"),
        (lambda files: files[:2] + files[3:], "pruned: 'model-00001.safetensors' is missing (1 of 2 are missing)"),
        (lambda files: [files[0], Sent("a.safetensors", "{")], "a.safetensors: is not JSON"),
        (lambda files: [files[0], Sent("a.safetensors", '{"\ud800": 1}')], "tensor '?': expected dtype, shape"),
        (lambda files: [files[0], Sent("a.safetensors", '{"x": 1}')], "expected dtype, shape and data_offsets"),
        (lambda files: [files[0], files[1]], "pruned: expected lm_head.weight, or"),
    ],
)
def test_a_bad_checkpoint_is_one_line(change: Any, says: str, checkpoint: Path) -> None:
    files = files_of(checkpoint)
    assert [Path(f.name).name for f in files] == [
        "config.json", "model-00000.safetensors", "model-00001.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip
    with pytest.raises(InputError) as caught:
        take(change(files))
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


class Uncomparable(Sent):
    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared with another file")

    __hash__ = None


def test_files_of_a_drop_are_not_compared_with_each_other() -> None:
    files = [Uncomparable("m/config.json", json.dumps(TINY))]
    files += [Uncomparable(f"m/{i}.safetensors", "{}") for i in range(3)]
    with pytest.raises(InputError, match=r"^m: expected a whole model"):
        take(files)


def test_a_checkpoint_has_one_index() -> None:
    index = Sent("m/model.safetensors.index.json", "{}")
    with pytest.raises(InputError, match=r"^m: expected at most one \*\.safetensors\.index\.json, got 2$"):
        take([Sent("m/config.json", json.dumps(TINY)), index, replace(index, name="m/b.safetensors.index.json")])


@pytest.mark.parametrize(
    "rows",
    [
        [["a.#.#", "BF16", [1], [[0, 999]], [[0, 999]]]] * 2,
        [["a.#", "BF16", [1], [[0, 10**15]], [[-1, -1]]]],
        [["a#b#c#d", "BF16", [1], [[0, 0]], [[0, 0]]]],
        [["a", "BF17", [1], [[-1, -1]], [[-1, -1]]]],
        [["a", "BF16", [-1], [[-1, -1]], [[-1, -1]]]],
        [[1, "BF16", [1], [[0, 0]], [[0, 0]]]],
        [["a"]], [3], 3, {"a": 1},
    ],
)  # fmt: skip
def test_a_token_of_tensors_is_checked(rows: Any) -> None:
    packed = zlib.compress(json.dumps({"file": ".", "config": TINY, "tensors": rows}).encode())
    with pytest.raises(InputError):
        read_token(PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("="))


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


@pytest.mark.quick
def test_a_refused_token_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(text: str, file: str) -> Any:
        read.append(file)
        return hardware_from_text(text, file)

    monkeypatch.setattr("simulator.explore.dropped.hardware_from_text", counted)
    packed = zlib.compress(json.dumps({"file": "refused.yaml", "profile": "[]"}).encode())
    refused = PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    reasons = set()
    for _ in range(3):
        with pytest.raises(InputError) as caught:
            read_profile(refused)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "refused.yaml:1:1: file: expected a mapping" in reasons.pop()
    assert read == ["refused.yaml"]


@pytest.mark.quick
def test_a_refused_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def counted(data: Any, file: Any) -> Any:
        read.append(data)
        return from_file(data, file)

    monkeypatch.setattr("simulator.explore.dropped.from_file", counted)
    packed = zlib.compress(json.dumps({"file": "refused.json", "config": {"model_type": "none"}}).encode())
    refused = PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    for _ in range(3):
        with pytest.raises(InputError, match=r"refused\.json: model_type: architecture 'none' is not supported"):
            read_token(refused)
    assert len(read) == 1


@given(st.text(alphabet=f"{string.ascii_letters}{string.digits}-_=", max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_token_is_read_or_refused(text: str) -> None:
    with pytest.raises(InputError):
        read_token(PREFIX + text)
