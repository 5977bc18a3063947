"""What a person sees is what the Python interface says, whatever is clicked, typed, dropped or reloaded."""

from __future__ import annotations

import base64
import json
import shlex
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from explore_browser import Tab, check, needs_browser, predicted
from layouts import folder_of, save, save_shards, tensors_of
from test_explore_state import OWN, TINY

from simulator.cli import run
from simulator.explore.address import read_query, to_query
from simulator.explore.charts import CARDS
from simulator.explore.dropped import read_profile, read_token, token
from simulator.explore.markup import table_csv
from simulator.explore.predictions import predictions
from simulator.explore.state import EXISTING, State
from simulator.figures.style import label
from simulator.hardware.library import load_hardware
from simulator.models.huggingface import from_hf_config
from simulator.models.library import load_model
from simulator.pruning._methods import METHODS
from simulator.units import ratio, seconds

pytestmark = needs_browser

HOSTILE = "<img src=x onerror=document.pwned=1>"


def unharmed(tab: Tab) -> None:
    assert tab.page.locator("main img, form img").count() == 0
    assert tab.page.evaluate("document.pwned") is None


def _tick(name: str, value: str, on: bool = True) -> Callable[[Any], object]:
    return lambda page: page.set_checked(f"[name={name}][value={value}]", on, force=True)


def _choose(name: str, value: str) -> Callable[[Any], object]:
    return lambda page: page.select_option(f"#{name}", value)


def _type(name: str, value: str) -> Callable[[Any], object]:
    return lambda page: (page.fill(f"#{name}", value), page.press(f"#{name}", "Enter"))


def _lines(text: str) -> Callable[[Any], object]:
    return lambda page: (page.fill("#prune", text), page.press("#prune", "Enter"))


FAMILIES = ("depth", "width", "dynamic_depth", "token")
CHANGES: tuple[tuple[Callable[[Any], object], dict[str, Any]], ...] = (
    (_choose("model", "qwen3-8b"), {"model": "qwen3-8b"}),
    (_tick("gpu", "a100_sxm_80gb"), {"gpus": ("a100_sxm_80gb", "h100_sxm")}),
    (_tick("gpu", "h100_sxm", False), {"gpus": ("a100_sxm_80gb",)}),
    (_tick("family", "token"), {"families": (*State().families, "token")}),
    (_tick("family", "low_rank", False), {"families": FAMILIES}),
    (_type("sparsity", "0.25, 0.75"), {"sparsities": (0.25, 0.75)}),
    (_tick("phase", "decode"), {"phase": "decode"}),
    (_type("batch", "24"), {"batch": 24}),
    (_type("seq", "777"), {"seq": 777}),
    (_tick("phase", "generate"), {"phase": "generate"}),
    (_type("new", "19"), {"new_tokens": 19}),
    (_tick("phase", "serve"), {"phase": "serve"}),
    (_choose("engine", "hf"), {"engine": "hf"}),
    (_type("dense", "1234.5"), {"dense_ms": 1234.5}),
    (_choose("versus", "sglang"), {"versus": "sglang"}),
    (_choose("dtype", "fp16"), {"dtype": "fp16"}),
    (_choose("weights", "int4"), {"weights": "int4"}),
    (_type("devices", "2"), {"devices": 2}),
    (_choose("detail", "unstructured"), {"detail": "unstructured"}),
    (_type("at", "0.35"), {"at": 0.35}),
    (_lines("width mlp=30%\ndepth 0.25 + width 0.2"), {"prune": ("width mlp=0.3", "depth 0.25 + width 0.2")}),
    (_choose("detail", "depth 0.25 + width 0.2"), {"detail": "depth 0.25 + width 0.2"}),
    (_tick("over", "seq"), {"over": "seq"}),
)


def test_every_control_changes_what_is_shown(tab: Tab) -> None:
    tab.open()
    assert tab.query == ""
    assert all(figure["drawn"] for figure in tab.figures())
    state = State()
    for act, change in CHANGES:
        act(tab.page)
        tab.wait_until_shown()
        state = replace(state, **change)
        check(tab, state)
    assert tab.text("#problems") == ""
    assert all(urlsplit(request).hostname == "127.0.0.1" for request in tab.requests)
    assert len(tab.requests) > 10


def test_prunings_are_typed_chosen_and_refused_at_their_field(tab: Tab) -> None:
    tab.open("?phase=decode&family=depth&detail=depth")
    state = State(phase="decode", families=("depth",), detail="depth")
    tab.page.fill("#prune", "depth layers=0,5")
    tab.page.select_option("#method", label="shortgpt: Depth")
    tab.wait_until_shown()
    sparsities = METHODS["shortgpt"].sparsities
    state = replace(state, prune=("depth layers=0,5", *(f"shortgpt {s:g}" for s in sparsities)))
    check(tab, state)
    assert tab.page.input_value("#method") == ""
    tab.page.fill("#prune", f"width mlp=0.3\n{HOSTILE}\nwidth mpl=0.3\n./plan.yaml")
    tab.page.press("#prune", "Tab")
    tab.wait_until_shown()
    lines = tab.text("#note-prune").splitlines()
    assert any(line.startswith("pruning 'width mpl=0.3', column 7: part or option of width 'mpl'") for line in lines)
    assert any("the page opens no files" in line for line in lines)
    assert tab.text("#problems") == ""
    unharmed(tab)
    assert [row[0] for row in tab.table()[1:] if row[0] != label("depth")] == ["width mlp=0.3"]
    tab.page.go_back()
    tab.wait_until_shown()
    check(tab, state)
    assert tab.text("#note-prune") == ""


def test_a_setting_is_pinned_and_compared(tab: Tab) -> None:
    tab.open("?phase=decode&family=depth&detail=depth&batch=4")
    assert not tab.page.locator("#pinned").is_visible()
    tab.page.click("button:has-text('Pin as A')")
    tab.wait_until_shown()
    tab.page.select_option("#engine", "hf")
    tab.wait_until_shown()
    a = State(phase="decode", families=("depth",), detail="depth", batch=4)
    state = replace(a, engine="hf", pin=a)
    check(tab, state)
    rows = dict(line.split("\t", 1) for line in tab.text("#pinned table").splitlines() if "\t" in line)
    assert rows["engine"] == "vllm\thf"
    speedups = [predictions(s).details[0].result.speedup for s in (a, state)]
    assert [text[:4] for text in rows["speedup"].split("\t")] == [ratio(s) for s in speedups]
    assert "A, pinned" in tab.text("#commands")
    tab.page.reload()
    tab.wait_until_shown()
    check(tab, state)
    tab.page.click("button:has-text('Remove A')")
    tab.wait_until_shown()
    check(tab, replace(state, pin=None))
    assert not tab.page.locator("#pinned").is_visible()
    tab.page.go_back()
    tab.wait_until_shown()
    check(tab, state)


def test_a_gpu_without_the_number_format_leaves_the_others(tab: Tab) -> None:
    tab.go("?gpu=h100_sxm,cpu")
    assert "cpu has no bf16 arithmetic" in tab.text("#notes")
    assert {row[3] for row in tab.table()[1:]} == {"h100_sxm"}
    tab.page.uncheck("[name=gpu][value=h100_sxm]")
    tab.wait_until_shown()
    assert tab.text("#table") == "cpu has no bf16 arithmetic; it has fp32"
    assert "cpu has no bf16" in tab.text("#speedup")
    tab.page.select_option("#dtype", "fp32")
    tab.wait_until_shown()
    assert {row[3] for row in tab.table()[1:]} == {"cpu"}


def seen(tab: Tab) -> list[Any]:
    """All that is shown, figures as they are drawn."""
    return [tab.table(), *(tab.text(f"#{name}") for name in ("title", "facts", "notes", "commands")), *tab.figures()]


def test_the_address_is_the_state(tab: Tab) -> None:
    tab.go("?phase=decode")
    tab.page.check("[name=gpu][value=rtx_4090]")
    tab.fill(seq=4096)
    before = seen(tab)
    tab.page.reload()
    tab.wait_until_shown()
    assert seen(tab) == before


def test_back_and_forward(tab: Tab) -> None:
    tab.go().fill(batch=4)
    tab.page.locator("#seq").click()
    tab.page.keyboard.press("Control+A")
    tab.page.keyboard.type("512")  # typing is one step
    tab.wait_until_shown()
    tab.page.select_option("#engine", "hf")
    tab.wait_until_shown()
    state = State(batch=4, seq=512, engine="hf")
    check(tab, state)
    for step in (replace(state, engine="vllm"), State(batch=4)):
        tab.page.go_back()
        tab.wait_until_shown()
        check(tab, step)
    tab.page.go_back()
    tab.wait_until_shown()
    assert tab.query == ""
    assert tab.page.input_value("#batch") == "1", "the controls follow an address that names nothing"
    assert tab.table()[1][4] == ratio(predicted(State())[0].speedup)
    tab.page.go_forward()
    tab.wait_until_shown()
    check(tab, State(batch=4))


def test_bad_values_are_named(tab: Tab) -> None:
    tab.open(f"?model={quote(HOSTILE)}&batch=x&gpu=h10&colour=red&at=7&family={quote(HOSTILE)}")
    lines = tab.text("#problems").splitlines()
    for words in (HOSTILE, "batch 'x'", "did you mean h100 or", "key 'colour' is unknown", "7: expected a fraction"):
        assert any(words in line for line in lines), words
    unharmed(tab)
    assert tab.page.input_value("#batch") == "1"
    tab.fill(batch=2)
    check(tab, State(batch=2))
    assert tab.text("#problems") == ""
    before = tab.query
    tab.fill(batch="")
    assert (tab.query, tab.text("#problems")) == (before, ""), "an unfinished number waits"
    tab.page.press("#batch", "Tab")
    tab.wait_until_shown()
    assert tab.text("#problems") == "batch '': expected a whole number; shown with 1"


STRANGE = json.dumps({**TINY, "model_type": HOSTILE}).encode()
OPTIONS = {"model": "#model option", "pruned": "#pruned option", "gpu": "#gpus input"}

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "notes.txt": (b"this is no JSON", "notes.txt:1:1: is not JSON"),
    "huge.json": (b" " * 1_000_001, "huge.json: 1000001 bytes; expected a config.json of at most 1000000 bytes"),
    "escapes.json": (b"\x01" * 1_000_000, "escapes.json:1:1: is not JSON"),
    "weights.bin": (bytes(range(256)), "weights.bin: is not UTF-8 text; expected a config.json"),
    f"{HOSTILE}.json": (STRANGE, f"architecture '{HOSTILE}' is not supported"),
    "short.safetensors": (b"\x01", "short.safetensors: is not a safetensors file: its header would not fit into it"),
    "long.safetensors": (b"\xff" * 99, "long.safetensors: is not a safetensors file: its header would not fit into it"),
    "alone.safetensors": (struct.pack("<Q", 2) + b"{}", "alone.safetensors: expected the config.json of its folder"),
    "mine.yaml": (b"name: mine", "mine.yaml:1:1: schema_version: is missing"),
}

TRANSFER = """(files) => {
  const transfer = new DataTransfer(), bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  for (const [name, text] of files) transfer.items.add(new File([bytes(text)], name));
  return transfer;
}"""


def drop(tab: Tab, files: dict[str, bytes], into: str = "model") -> None:
    packed = [[name, base64.b64encode(content).decode()] for name, content in files.items()]
    made = tab.page.evaluate_handle(TRANSFER, packed)
    for event in ("dragover", "drop"):
        tab.page.dispatch_event(f"[data-into={into}]", event, {"dataTransfer": made})


def choose(tab: Tab, files: dict[str, bytes] | list[Path], into: str = "model") -> None:
    named = isinstance(files, dict)
    held: Any = [{"name": n, "mimeType": "", "buffer": c} for n, c in files.items()] if named else files
    with tab.page.expect_file_chooser() as chooser:
        tab.page.click(f"[data-open={into}]")
    chooser.value.set_files(held)


def taken(tab: Tab, into: str) -> str:
    """The token of what was dropped, once the page has it."""
    tab.page.wait_for_selector(f"{OPTIONS[into]}[value^=dropped]:checked", state="attached")
    tab.wait_until_shown()
    return str(tab.page.locator(f"{OPTIONS[into]}[value^=dropped]:checked").get_attribute("value"))


@pytest.mark.parametrize("give", [drop, choose])
def test_a_good_config_is_predicted(give: Callable[..., None], tab: Tab, tmp_path: Path) -> None:
    content = json.dumps({**TINY, "_name_or_path": "someone/tiny"}).encode()
    give(tab.go(), {"config.json": content})
    tab.page.wait_for_selector("#title:has-text('tiny')")
    tab.wait_until_shown()
    file = tmp_path / "config.json"
    file.write_bytes(content)
    state = State(model=token(content.decode(), "config.json"))
    assert state.load() == load_model(file)
    check(tab, state)
    assert tab.page.locator("#model option:checked").inner_text() == "tiny (config.json)"
    assert tab.text("#commands").splitlines()[1].startswith("prunesim speedup ./config.json --hardware")
    if give is choose:
        return
    tab.page.select_option("#model", "llama-2-7b")
    for go in (tab.page.reload, tab.page.go_back):
        tab.wait_until_shown()
        go()
    tab.wait_until_shown()
    check(tab, state)


def test_of_a_checkpoint_the_headers_alone_are_read(tab: Tab, tmp_path: Path) -> None:
    dense = load_model("llama-3.1-8b")
    real = replace(dense, layers=28, windows=dense.windows[:28], inner=11264)
    folder = folder_of(tmp_path, "llama-3.1-8b")
    content = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 28, "_name_or_path": HOSTILE}
    (folder / "config.json").write_text(json.dumps(content))
    save_shards(folder, tensors_of(real), 2)
    (folder / "tokenizer.json").write_text("{}")
    assert sum(file.stat().st_size for file in folder.iterdir()) > 10e9
    sent: list[int] = []
    tab.page.on("request", lambda r: sent.append(len(r.post_data or "")))
    choose(tab.go("?phase=decode"), sorted(folder.iterdir()), "pruned")
    made = taken(tab, "pruned")
    assert max(sent) < 200_000
    assert read_token(made)[1] == load_model(folder)
    state = State(phase="decode", pruned=made, detail=EXISTING)
    check(tab, state)
    assert "an MLP of 11,264 of 14,336" in tab.text("#notes")
    (row,) = [row for row in tab.table()[1:] if row[0] not in map(label, state.drawn)]
    assert row[4] == ratio(predictions(state).existing[0].speedup)
    unharmed(tab)
    tab.page.select_option("#pruned", "")
    tab.wait_until_shown()
    check(tab, State(phase="decode"))


FOLDER = """([name, files]) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const file = ([n, text]) => ({isFile: true, name: n, file: (done) => done(new File([bytes(text)], n))});
  const parts = [files.map(file), []];  // a reader gives a part of the entries at a time, at last none
  const folder = {isFile: false, name, createReader: () => ({readEntries: (done) => done(parts.shift())})};
  const event = new Event("drop", {bubbles: true});
  Object.defineProperty(event, "dataTransfer", {value: {items: [{webkitGetAsEntry: () => folder}]}});
  document.querySelector("[data-into=pruned]").dispatchEvent(event);
}"""


def test_a_folder_is_dropped_whole(tab: Tab, tmp_path: Path) -> None:
    small = TINY | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(small))
    save(tmp_path / "model.safetensors", tensors_of(replace(from_hf_config(small), inner=64)))
    (tmp_path / "tokenizer.json").write_text(" " * 2_000_000)
    files = [[f.name, base64.b64encode(f.read_bytes()).decode()] for f in sorted(tmp_path.iterdir())]
    tab.go().page.evaluate(FOLDER, ["cut", files])
    name, model = read_token(taken(tab, "pruned"))
    assert (name, model.inner) == ("cut", 64)
    assert tab.page.locator("#pruned option:checked").inner_text() == "cut (checkpoint)"
    assert "--pruned ./cut" in tab.text("#commands")


def test_a_dropped_profile_takes_the_place_of_its_name(tab: Tab) -> None:
    drop(tab.go(), {"own.yaml": OWN.encode()}, "gpu")
    state = State(gpus=(taken(tab, "gpu"),))
    assert read_profile(state.gpus[0])[1].bandwidth_bytes_per_s == load_hardware("rtx_3090").bandwidth_bytes_per_s
    check(tab, state)
    tab.page.reload()
    tab.wait_until_shown()
    check(tab, state)
    tab.page.check("[name=gpu][value=h100_sxm]")
    tab.wait_until_shown()
    assert "two profiles are called h100_sxm" in tab.text("#problems")
    unharmed(tab)


@pytest.mark.parametrize("give", [drop, choose])
def test_a_bad_file_is_one_line(give: Callable[..., None], tab: Tab) -> None:
    tab.go()
    for into, (name, (content, says)) in zip(["model", "pruned", "gpu"] * 3, BAD_FILES.items(), strict=True):
        give(tab, {name: content}, into)
        tab.page.locator(f"#note-{into}", has_text=says).wait_for()
        assert "\n" not in tab.text(f"#note-{into}")
        assert tab.query == ""
    unharmed(tab)
    tab.fill(batch=2)
    check(tab, State(batch=2))
    for names, says in ((("a.json", "b.json"), "2 files: expected one"), (("a.txt", "a/config.json"), "is not JSON")):
        drop(tab, dict.fromkeys(names, b"no"))
        tab.page.locator("#note-model", has_text=says).wait_for()


def test_hostile_names_are_text(tab: Tab) -> None:
    content = json.dumps({**TINY, "_name_or_path": HOSTILE}).encode()
    drop(tab.go(), {f"{HOSTILE}.json": content})
    tab.page.wait_for_selector("#title:has-text('onerror')")
    tab.wait_until_shown()
    check(tab, State(model=token(content.decode(), f"{HOSTILE}.json")))
    unharmed(tab)


def saved(tab: Tab, selector: str) -> tuple[str, bytes]:
    with tab.page.expect_download() as download:
        tab.page.click(selector)
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_figures_and_table_can_be_saved(tab: Tab) -> None:
    state = State(gpus=("h100_sxm", "rtx_4090"), phase="decode", batch=5)
    tab.go("?" + to_query(state))
    for figure in CARDS:
        name, svg = saved(tab, f"[data-save={figure}][data-kind=svg]")
        assert (name, svg[:4]) == (f"prunesim-{figure}.svg", b"<svg")
        assert b"RTX 4090" in svg
    name, png = saved(tab, "[data-save=speedup][data-kind=png]")
    box = tab.page.locator("#speedup").bounding_box()
    assert (name, png[:4]) == ("prunesim-speedup.png", b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (2 * int(box["width"]), 2 * int(box["height"]))
    assert len(png) > 20_000
    assert saved(tab, "[data-csv]") == ("prunesim.csv", table_csv(predicted(state)).encode())


def test_the_commands_give_the_numbers_shown(tab: Tab, capsys: pytest.CaptureFixture[str]) -> None:
    tab.go("?phase=decode&batch=8&gpu=rtx_4090&family=depth,low_rank")
    tab.page.locator("[data-copy]").first.click()
    tab.page.locator("[data-copy]", has_text="Copied").wait_for()
    line = tab.page.evaluate("navigator.clipboard.readText()")
    assert line == tab.page.locator("#commands code").first.inner_text()
    program, *arguments = shlex.split(line)
    assert program == "prunesim"
    assert run([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    shown = [(row[0], row[3], row[4], row[9]) for row in tab.table()[1:]]
    assert shown == [(label(r["family"]), r["hardware"], ratio(r["speedup"]), seconds(r["pruned_s"])) for r in printed]
    assert [r["speedup"] for r in printed] == [r.speedup for r in predicted(read_query(tab.query)[0])]
