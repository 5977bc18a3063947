"""The page without a browser: Streamlit runs it, and its elements are compared with the library."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason='no module streamlit: pip install -e ".[explore]"')

from streamlit.testing.v1 import AppTest

import simulator
from simulator.explore import app
from simulator.prediction.load_sentences import load_columns, of_loads
from simulator.prediction.speedup_sentences import break_even

PAGE = Path(app.__file__)

WATCHED: list[str] = []
"""Paths that were opened or listed while a test watches."""

_watching = [False]


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if (
        _watching[0]
        and event in ("open", "os.listdir", "os.scandir")
        and isinstance(arguments[0], str)
    ):
        WATCHED.append(arguments[0])


sys.addaudithook(_watch)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    WATCHED.clear()
    _watching[0] = True
    yield WATCHED
    _watching[0] = False


def page(**address: Any) -> AppTest:
    """The page at an address."""
    at = AppTest.from_file(PAGE, default_timeout=60)
    for name, value in address.items():
        at.query_params[name] = value
    return good(at.run())


def good(at: AppTest) -> AppTest:
    """The same page, which has no traceback."""
    assert [e.message for e in at.exception] == []
    return at


def texts(at: AppTest) -> str:
    return unescape("\n".join(element.proto.body for element in at.get("html")))


def address(at: AppTest) -> dict[str, list[str]]:
    """The settings in the address; versions of Streamlit differ in the form of a single value."""
    return {
        name: [value] if isinstance(value, str) else list(value)
        for name, value in at.query_params.items()
    }


def expected(**changes: Any) -> Any:
    """The table that the page shows at first, with changes."""
    asked: dict[str, Any] = {
        "models": "llama-3.1-8b",
        "hardware": ["h100"],
        "family": ["depth", "width", "low_rank", "dynamic_depth"],
        "sparsity": [0.25],
        "batch": [1, 4, 16, 64],
        "phase": "decode",
    }
    return simulator.table(
        **{name: value for name, value in {**asked, **changes}.items() if value is not None}
    )


def shows(at: AppTest, found: Any) -> bool:
    """Whether the table of the page has these predictions."""
    shown = at.dataframe[0].value
    same = shown["pruning"].tolist() == [r.pruning for r in found]
    return same and shown["speedup"].tolist() == pytest.approx(
        [r.speedup for r in found], rel=1e-12
    )


def test_the_page_answers_at_once() -> None:
    at, found = page(), expected()
    assert shows(at, found)
    assert all(pays.sentence in texts(at) for pays in break_even(found.rows))
    assert texts(at).count("data:image/svg+xml") == 3
    assert len(at.error) == len(at.warning) == 0
    assert [m.value for m in at.markdown] == ["## How much faster will a pruned model be?"]
    assert address(at) == {}


# settings as the widgets hold them, and those that the request has in another form
WIDGETS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {
            "model": "qwen3-8b",
            "hardware": ["h100_sxm", "a100_sxm_80gb"],
            "engine": ["hf", "vllm"],
            "phase": "serve",
            "sparsity": "25%, 0.5",
            "batch": "1, 64",
            "seq": "8k",
        },
        {"models": "qwen3-8b", "sparsity": [0.25, 0.5], "batch": [1, 64], "seq": 8192},
    ),
    (
        {
            "family": ["token"],
            "weight_dtype": "int8",
            "kv_dtype": "fp8",
            "devices": "4",
            "dense_s": "8ms",
            "batch": "2",
        },
        {"devices": 4, "dense_s": 0.008, "batch": 2},
    ),
    ({"dtype": "fp8"}, {}),
]


@pytest.mark.parametrize(("values", "changes"), WIDGETS)
def test_widgets_change_the_request_and_the_address(
    values: dict[str, Any], changes: dict[str, Any]
) -> None:
    at = page(sparsity="50%")
    for widget in (*at.selectbox, *at.multiselect, *at.text_input):
        if widget.key in values:
            widget.set_value(values[widget.key])
    good(at.run())
    found = expected(**{"sparsity": [0.5], **values, "model": None, **changes})
    assert shows(at, found)
    set_there = address(at)
    assert all(set_there[name] == ([v] if isinstance(v, str) else v) for name, v in values.items())
    again = page(**set_there)
    assert shows(again, found)
    assert len(again.warning) == 0


def test_prunings_are_typed_and_mistakes_are_one_line() -> None:
    at = page(by="text", prune="width mlp=0.3\ndepth 0.25", batch="8")
    assert shows(
        at, expected(family=None, sparsity=None, prune=["width mlp=0.3", "depth 0.25"], batch=8)
    )
    assert "will it run? Yes" in texts(at)
    for text, message in (
        ("width mlp=oops", "column 11: expected a fraction"),
        ("plan.yaml", "expected no plan"),
    ):
        good(at.text_area(key="prune").set_value(text).run())
        (error,) = at.error
        assert message in error.value
        assert "\n" not in error.value
        assert len(at.dataframe) == 0
    good(at.text_area(key="prune").set_value("shortgpt 0.3").run())
    assert len(at.error) == 0
    good(at.text_input(key="batch").set_value("0").run())
    assert at.error[0].value == "Batch: batch: expected a whole number from 1 to 2147483647, got 0"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hardware", [], "hardware: expected at least one"),
        ("family", [], "family: expected at least one"),
        ("hardware", ["t4"], "t4 has no bf16 arithmetic"),
        ("sparsity", ", ".join(["0.5"] * 30), "expected 1 to 25 values"),
        (
            "batch",
            ",".join(map(str, range(1, 26))),
            "expected at most 1,000 predictions, got 1,400",
        ),
    ],
)
def test_requests_that_cannot_be_predicted_are_one_line(
    name: str, value: Any, message: str
) -> None:
    at = page(hardware=["h100_sxm", "a100_sxm_80gb"], sparsity="10%,20%,30%,40%,50%,60%,70%")
    widget = next(w for w in (*at.selectbox, *at.multiselect, *at.text_input) if w.key == name)
    good(widget.set_value(value).run())
    (error,) = at.error
    assert message in error.value


def test_another_pruning_is_explained_on_request_and_stays() -> None:
    at = page(sparsity="50%, 70%", batch="1")
    assert "low_rank at 70 % (69.8 % realised) of llama-3.1-8b: nominal 3.33x" in texts(at)
    good(at.selectbox(key="explained").set_value("width at 50 %").run())
    assert "width at 50 % of llama-3.1-8b: nominal 2.00x" in texts(at)
    good(at.selectbox(key="phase").set_value("prefill").run())
    assert "width at 50 % of llama-3.1-8b: nominal 2.00x" in texts(at)
    assert address(at) == {
        "sparsity": ["50%, 70%"],
        "batch": ["1"],
        "phase": ["prefill"],
        "detail": ["width at 50 %"],
    }


def test_the_commands_of_the_page_give_its_numbers(cli: Any, tmp_path: Path) -> None:
    at = page(
        engine=["hf", "vllm"],
        sparsity="25%,",
        kv_dtype="fp8",
        phase="generate",
        new_tokens="16",
        parallel="tensor",
        hardware=["h100_sxm", "t4"],
        batch="1, ,8",
    )
    speedup, explain = (line.removeprefix("prunesim ") for line in at.code[0].value.splitlines())
    cli(f"{speedup} --csv {tmp_path / 'own.csv'}")
    own = (tmp_path / "own.csv").read_text().splitlines()
    assert len(own) == 1 + len(at.dataframe[0].value)
    assert cli.out(explain).split(";")[0].split(", predicted")[0] in texts(at)


def test_energy_is_shown_on_request(cli: Any) -> None:
    at = page(sparsity="50%", batch="1")
    assert "energy saved" not in at.dataframe[0].value
    good(at.selectbox(key="energy").set_value("shown").run())
    assert len(at.dataframe[0].value["energy saved"]) == 4
    assert "of the energy on h100_sxm" in texts(at)
    speedup, _ = at.code[0].value.splitlines()
    assert "energy per new token" in cli.out(speedup.removeprefix("prunesim "))
    assert address(at) == {"sparsity": ["50%"], "batch": ["1"], "energy": ["shown"]}


def test_drafts_are_shown_on_request() -> None:
    at = page(sparsity="50%", batch="1", family="depth", draft="shown")
    rows = simulator.draft("llama-3.1-8b", "depth 0.5", "h100")
    best = min(rows, key=lambda row: row.pays_from)
    ends = f"{best.pays_from:.2f} ({best.pays_from_lower:.2f}-{best.pays_from_upper:.2f})"
    assert f"depth 0.5 pays as a draft from an acceptance of {ends}: batch 1" in texts(at)
    good(at.selectbox(key="phase").set_value("prefill").run())
    assert "as a draft" not in texts(at)


def test_a_setting_that_is_not_shown_is_not_read() -> None:
    at = page(phase="generate", sparsity="25%")
    good(at.text_input(key="new_tokens").set_value("many").run())
    assert at.error[0].value.startswith("New tokens")
    good(at.selectbox(key="phase").set_value("decode").run())
    assert len(at.error) == 0


def test_names_in_an_address_are_no_links() -> None:
    at = page(**{"http://a.b/c": "1", "www.a.b": "1", "$x$": "1", "batch-size": "1"})
    assert at.warning[0].value.endswith("ignored: http???a?b?c, www?a?b, ?x?, batch-size")


def test_hostile_settings_of_an_address_are_ignored_with_one_message(opened: list[str]) -> None:
    hostile = {
        "model": "../../etc/passwd",
        "hardware": ["h100_sxm", "<img src=x onerror=alert(1)>"],
        "engine": "/etc/passwd",
        "family": "__import__('os')",
        "by": "nothing",
        "phase": "x" * 100_000,
        "batch": "9" * 5000,
        "seq": "1e308",
        "sparsity": "nan",
        "prune": "../../etc/passwd.yaml",
        "dense_time": "-1ms",
        "devices": "0",
        "detail": "a\0b",
        "<script>alert(1)</script>": "1",
    }
    at = page(**hostile)
    (warning,) = at.warning
    assert warning.value.startswith(
        "Settings of the address that were ignored: model, hardware, engine, family, by"
    )
    assert "<" not in warning.value
    assert len(at.error) == 0
    assert shows(at, expected())
    assert not [path for path in opened if "passwd" in path]
    good(at.run())
    assert len(at.warning) == 0
    assert address(at) == {}


def test_a_path_in_the_address_fills_its_field_and_is_read_after_a_click(
    opened: list[str], hostile_model: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "own.yaml"
    text = (Path(simulator.__file__).parents[1] / "hardware_profiles" / "t4.yaml").read_text()
    profile.write_text(text.replace("name: t4", "name: own").replace('"tesla_t4", "nvidia_t4"', ""))
    opened.clear()
    at = page(
        model_path=str(hostile_model),
        profile_path=str(profile),
        dtype="fp16",
        hardware="t4",
        by="text",
        prune="depth 0.5",
    )
    assert at.text_input(key="model_path").value == str(hostile_model)
    assert at.caption[0].value == "A file is read after a click on Open."
    assert "llama-3.1-8b" in texts(at)
    assert not [path for path in opened if str(tmp_path) in path]
    good(at.button[0].click().run())
    assert [path for path in opened if str(tmp_path) in path]
    assert [e.value for e in at.error] == []
    assert set(at.dataframe[0].value["hardware"]) == {"t4", "own"}
    assert hostile_model.name in texts(at)
    assert not [e for e in at.get("html") if "<img src=x" in e.proto.body]
    assert f"{shlex.quote(str(hostile_model))} --hardware t4,{profile}" in at.code[0].value
    opened.clear()
    good(at.text_input(key="model_path").set_value("/etc/passwd").run())
    assert "llama-3.1-8b" in texts(at)
    assert not [path for path in opened if "passwd" in path]
    good(at.button[0].click().run())
    assert "passwd" in at.error[0].value
    assert "\n" not in at.error[0].value


def test_a_pruned_checkpoint_is_compared_after_a_click(tmp_path: Path, hostile_model: Path) -> None:
    at = page(by="checkpoint", pruned_path=str(hostile_model), model="llama-3.2-1b", batch="1")
    assert at.error[0].value.startswith("checkpoint: expected the path of a pruned checkpoint")
    good(at.button[0].click().run())
    assert len(at.error) == 0
    assert at.dataframe[0].value["pruning"].tolist() == [hostile_model.name]
    good(at.text_input(key="pruned_path").set_value(str(tmp_path / "no")).run())
    good(at.button[0].click().run())
    assert [e.value.count("\n") for e in at.error] == [0, 0]


def test_an_older_release_of_an_engine_is_typed_but_no_engine_file(
    opened: list[str], tmp_path: Path
) -> None:
    at = page(engine="vllm@0.10")
    assert shows(at, expected(engine="vllm@0.10"))
    assert address(at) == {"engine": ["vllm@0.10"]}
    for name in (str(tmp_path / "own.yaml"), "vllm@never"):
        good(at.multiselect(key="engine").set_value(["vllm", name]).run())
        assert at.error[0].value.startswith("engine")
    assert not [path for path in opened if "own.yaml" in path]


OWN = """\
method: half-keys
sparsities: [0.5]
dynamic:
  attention: {keys: 1 - s}
"""


def test_a_pasted_method_stands_next_to_families_and_published_methods(
    opened: list[str], tmp_path: Path, cli: Any
) -> None:
    at = page(batch="1", phase="prefill", seq="8192", family=["depth", "shortgpt"])
    good(at.text_area(key="method").set_value(OWN).run())
    assert len(at.error) == 0
    shown = at.dataframe[0].value
    names = ["depth at 25 %", "ShortGPT at 25 %", "ShortGPT at 27 %", "half-keys at 50 %"]
    assert shown["pruning"].tolist() == names
    own = simulator.Method.of({"method": "k", "dynamic": {"attention": {"keys": "0.5"}}})
    (found,) = simulator.table("llama-3.1-8b", "h100", prune=own, phase="prefill", seq=8192)
    assert shown["speedup"].tolist()[-1] == pytest.approx(found.speedup, rel=1e-12)
    assert not [path for path in opened if "half-keys" in path]
    assert page(**address(at)).dataframe[0].value.equals(shown)
    (tmp_path / "half-keys.yaml").write_text(OWN)
    words = at.code[0].value.splitlines()[0].removeprefix("prunesim ")
    rows = cli.json(words.replace("half-keys.yaml", str(tmp_path / "half-keys.yaml")))
    assert [row["speedup"] for row in rows] == pytest.approx(shown["speedup"].tolist(), rel=1e-12)


def test_a_pasted_method_shows_all_its_problems() -> None:
    at = page(method="method: a\ndynamic:\n  attention: {keys: 2}\n  gate: {n: 0.5}\n")
    assert [warning.value.endswith("ignored: method") for warning in at.warning] == [True]
    text = at.text_area(key="method").set_value("method: a\ndynamic:\n  gate: {n: 0.5}\nextra: 1\n")
    good(text.run())
    first, every = (error.value for error in (*at.main.error, *at.sidebar.error))
    assert "3:3: dynamic.gate" in first
    assert ["3:3: dynamic.gate" in line for line in every.split("  \n")] == [True, False]
    assert "4:1: extra" in every
    assert len(at.dataframe) == 0


@pytest.mark.parametrize("line", ["{}", "{} 0.5", "{}=0.5", "depth 0.1+{} s=0.5", "{} 0.5 + {}"])
def test_a_typed_path_is_never_opened(opened: list[str], line: str) -> None:
    at = page(by="text")
    opened.clear()
    path = str(Path(simulator.__file__).parent / "pruning" / "methods" / "flap.yaml")
    good(at.text_area(key="prune").set_value(line.replace("{}", path)).run())
    assert "expected no plan or method file" in at.error[0].value
    assert path not in opened


def test_requests_that_arrive_at_a_rate() -> None:
    asked = {"model": "llama-3.1-8b", "by": "text", "prune": "depth 0.25", "phase": "serve"}
    at = page(**asked, rate="5", ttft="300ms", seq="1024")
    (load,) = simulator.serve(
        "llama-3.1-8b",
        "h100",
        rate=5.0,
        ttft_s=0.3,
        prune="depth 0.25",
        seq=1024,
        new_tokens=int(at.session_state.new_tokens),
    ).loads
    assert all(sentence in texts(at) for sentence in of_loads([load]))
    shown = at.dataframe[0].value
    assert shown["model"].tolist() == ["dense", "depth at 25 %"]
    cells = load_columns(load.points)
    assert {name: shown[name].tolist() for name in cells} == cells
    assert texts(at).count("data:image/svg+xml") == 1
    assert at.code[0].value.startswith("prunesim serve llama-3.1-8b --hardware h100_sxm")
    assert "--rate 5" in at.code[0].value
    assert "expected phase serve" in page(rate="5", sparsity="0.5", family=["depth"]).error[0].value
    many = page(phase="serve", rate="5", sparsity="10%,20%,30%,40%,50%,60%,70%").error[0].value
    assert "expected at most 8 predictions, got 28; see prunesim serve" in many
