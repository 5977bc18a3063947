"""The page in a real browser: keyboard, window sizes, the report, several tabs, the end, and who else might ask."""

from __future__ import annotations

import http.client
import json
import re
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from explore_browser import CLASHES, LAPTOP, OUTSIDE, PHONE, Tab, check, needs_browser, predicted, start
from test_explore_state import OWN, TINY

from simulator.cli import run
from simulator.explore.address import KEYS
from simulator.explore.charts import CARDS
from simulator.explore.dropped import profile_token, token
from simulator.explore.state import State
from simulator.figures.style import label
from simulator.pruning import FAMILIES

pytestmark = needs_browser


FOCUS = """() => {
  const e = document.activeElement, data = e.dataset;
  const style = getComputedStyle(e.type === "radio" ? e.nextElementSibling : e);
  const box = (e.type === "radio" ? e.nextElementSibling : e).getBoundingClientRect();
  const all = [...document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex='0']")];
  const button = data.save || ["csv", "open", "copy", "pin"].find((name) => name in data) || e.className || e.tagName;
  const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  return {
    name: e.name || e.id || button, place: all.indexOf(e), seen: ring && box.right > 0 && box.width > 0,
    inside: box.top < innerHeight && box.bottom > 0,
  };
}"""


def test_everything_can_be_reached_by_keyboard(tab: Tab) -> None:
    tab.open("?phase=serve")
    reached: list[dict[str, Any]] = []
    for _ in range(140):
        tab.page.keyboard.press("Tab")
        at = tab.page.evaluate(FOCUS)
        if at["name"] == "BODY" or (reached and at["place"] <= reached[-1]["place"]):
            break
        reached.append(at)
    names = [at["name"] for at in reached]
    assert names[0] == "skip"
    assert {*KEYS, *CARDS, "open", "csv", "table", "copy", "method"} <= set(names)
    assert names.count("family") == len(FAMILIES)
    assert names.count("phase") == 1, "radios are one stop, arrow keys go on"
    assert all(at["seen"] for at in reached), [at["name"] for at in reached if not at["seen"]]
    assert all(at["inside"] for at in reached), "what has the focus is scrolled to"


def test_the_keyboard_alone_changes_the_page(tab: Tab) -> None:
    tab.open("?seq=100")
    keyboard = tab.page.keyboard
    keyboard.press("Tab")
    assert tab.page.locator(".skip").bounding_box()["x"] >= 0
    keyboard.press("Enter")
    assert tab.page.evaluate("document.activeElement.id") == "results"
    keyboard.press("Tab")
    assert tab.page.evaluate("'pin' in document.activeElement.dataset")
    for selector, act, keys in (
        ("[name=phase]:checked", keyboard.press, "ArrowRight"),
        ("[name=family][value=kv_cache]", keyboard.press, "Space"),
        ("#model", keyboard.type, "qwen3-8"),
        ("#batch", keyboard.press, "ArrowUp"),
    ):
        tab.page.locator(selector).focus()
        act(keys)
        tab.wait_until_shown()
    check(tab, State(model="qwen3-8b", phase="decode", batch=2, seq=100, families=(*State().families, "kv_cache")))


SMALL = token(json.dumps({**TINY, "_name_or_path": "x" * 90, "num_hidden_layers": 3}), "small.json")
LAYOUTS = {
    "default": "",
    "every family on three GPUs": f"?gpu=a100_sxm_80gb,h100_sxm,rtx_4090&family={','.join(FAMILIES)}",
    "generate": "?phase=generate&new=16&gpu=h100_sxm,rtx_4090&engine=hf&versus=trtllm",
    "serve with a measured time": "?phase=serve&batch=64&dense=3800",
    "two engines": "?phase=decode&engine=reference&versus=compile&detail=semi_structured",
    "two engines on three GPUs": "?gpu=a100_sxm_80gb,h100_sxm,rtx_4090&engine=hf&versus=reference&dense=50",
    "decode at batch 64": "?phase=decode&batch=64&detail=depth",
    "long names": "?model=" + token(json.dumps({**TINY, "_name_or_path": "x" * 90}), "y" * 90 + ".json"),
    "a pruned model and a profile": f"?pruned={SMALL}&detail=pruned&gpu={profile_token(OWN, 'y' * 90 + '.yaml')},l4",
    "weights in int4 on two devices": "?weights=int4&devices=2&phase=decode&gpu=a100,b200",
    "texts": "?gpu=a100,h100&phase=decode&batch=8&prune=width mlp=0.3 heads=0.2;depth 0.25 %2B width 0.2;shortgpt 0.25"
    "&detail=width mlp=0.3 heads=0.2&over=seq&pin=phase%3Dserve%26engine%3Dhf%26gpu%3Da100",
    "refused": "?gpu=a100_sxm_80gb&dtype=fp8",
    "problems": "?batch=x&gpu=h10&model=" + "z" * 200,
}
BELOW = """() => {
  // pixels of the notes that are out of sight
  const notes = document.querySelector(".notes");
  return notes ? notes.scrollHeight - notes.clientHeight : 0;
}"""
SIZES: dict[str, Any] = {
    "laptop": {"viewport": LAPTOP},
    "phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True},
}


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_cut_and_no_label_lies_on_another(size: str, tab: Tab, new_tab: Callable[..., Tab]) -> None:
    tab = tab if size == "laptop" else new_tab(**SIZES[size])
    for name, query in LAYOUTS.items():
        tab.go(query)
        assert tab.page.evaluate(OUTSIDE) == [], name
        assert tab.page.evaluate(CLASHES) == [], name
        assert size == "laptop" or not tab.page.evaluate(BELOW), f"{name}: a note is cut"
    if size == "phone":
        tab.page.click("summary")
        assert tab.page.evaluate(OUTSIDE) == []
        touched = "[...document.querySelectorAll('form button, form select, form .field input')]"
        heights = tab.page.evaluate(touched + ".map((e) => e.getBoundingClientRect().height)")
        assert min(height for height in heights if height) >= 24
        return
    tab.go(LAYOUTS["generate"])
    wide = tab.page.locator("#speedup").bounding_box()["height"]
    tab.page.set_viewport_size(PHONE)
    tab.page.wait_for_timeout(300)
    tab.wait_until_shown()
    assert tab.page.locator("#speedup").bounding_box()["height"] > 1.4 * wide, "a narrow window is drawn again"
    assert tab.page.evaluate(OUTSIDE) == []
    tab.page.set_viewport_size(LAPTOP)


def test_a_report_needs_no_network(new_tab: Callable[..., Tab], tmp_path: Path) -> None:
    options = ("--hardware", "h100,rtx_4090", "--phase", "decode", "-o", str(tmp_path / "r.html"))
    assert run(["report", "llama-3.1-8b", *options]) == 0
    for size in (LAPTOP, PHONE):
        check_report(new_tab(offline=True, viewport=size), tmp_path / "r.html")


def check_report(tab: Tab, file: Path) -> None:
    tab.page.goto(file.as_uri())
    records = predicted(State(gpus=("h100_sxm", "rtx_4090"), phase="decode"))
    curves = [t for t in tab.figure("speedup")["data"] if "markers" in t["mode"] and t["name"] == label("depth")]
    for curve, gpu in zip(curves, ("h100_sxm", "rtx_4090"), strict=True):
        assert curve["y"] == [r.speedup for r in records if (r.family, r.hardware) == ("depth", gpu)]
    assert all(figure["drawn"] for figure in tab.figures())
    assert len(tab.table()) == 1 + len(records)
    assert tab.page.evaluate(OUTSIDE) == []
    assert tab.page.evaluate(CLASHES) == []
    assert tab.requests == [file.as_uri()]


def test_the_last_of_many_quick_changes_in_two_tabs_is_shown(tab: Tab, new_tab: Callable[..., Tab]) -> None:
    one = tab.go("?phase=generate&gpu=h100_sxm,a100_sxm_80gb&new=16")
    two = new_tab().open("?phase=decode")
    for i in range(5, 12):
        one.page.fill("#batch", str(i))
        two.page.fill("#batch", str(10 * i))
    generate = State(phase="generate", gpus=("a100_sxm_80gb", "h100_sxm"), new_tokens=16, batch=11)
    for tab, state in ((one, generate), (two, State(phase="decode", batch=110))):
        tab.wait_until_shown()
        check(tab, state)
    shapes = one.figure("crossover")["layout"].get("shapes", [])
    assert not [s for s in shapes if s["type"] == "rect"], "11 is no batch of the map"


def test_a_port_that_is_taken_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explore", "--no-browser", "--port", str(urlsplit(url).port)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"prunesim: port \d+ is taken; choose another one with --port.*\n", err)


def test_two_profiles_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    assert run(["explore", "--no-browser", "--port", "0", "--hardware", f"h100,{tmp_path / 'own.yaml'}"]) == 2
    assert "two profiles are called h100_sxm; expected one of them" in capsys.readouterr().err


def test_ctrl_c_ends_it_and_the_page_says_so(browser: Any, tmp_path: Path) -> None:
    own = tmp_path / "h100_sxm.yaml"
    own.write_text(OWN)
    with start("--port", "0", "--hardware", str(own)) as process:
        assert process.stdout is not None
        tab = Tab(browser.new_page(), json.loads(process.stdout.readline())["url"]).open()
        check(tab, State(gpus=(str(own),)))
        tab.page.check("[name=gpu][value=l4]")
        tab.wait_until_shown()
        check(tab, State(gpus=("l4", str(own))))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, "Ctrl-C stops it\n")
    tab.page.fill("#batch", "3")
    tab.page.locator("#problems", has_text="is prunesim explore still running?").wait_for()
    tab.page.context.close()


def test_a_background_job_is_ended_too() -> None:
    with start("--port", "0", interrupt=signal.SIG_IGN) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        process.send_signal(signal.SIGINT)
        assert ask(url, "GET", "/_dash-layout", {})[0].status == 200, "such a job has no Ctrl-C"
        process.terminate()
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, "Ctrl-C stops it\n")


def ask(url: str, method: str, path: str, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
    port = urlsplit(url).port
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, headers={name: value.format(port=port) for name, value in headers.items()})
        answer = connection.getresponse()
        return answer, answer.read()


ANSWERED = ({}, {"Host": "localhost:{port}"}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"})
REFUSED = (
    {"Host": "evil.example:{port}"},
    {"Host": "127.0.0.1:1"},
    {"Host": "127.0.0.1:{port}.evil.example"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "iframe"},
)


@pytest.mark.parametrize("headers", ANSWERED + REFUSED)
def test_only_its_own_page_is_answered(url: str, headers: dict[str, str]) -> None:
    for path in ("/", "/_dash-layout"):
        answer, body = ask(url, "GET", path, headers)
        assert answer.status == (403 if headers in REFUSED else 200)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
        assert headers in ANSWERED or b"prunesim" not in body


def test_another_page_can_neither_read_nor_ask(tab: Tab) -> None:
    tab.page.goto("data:text/html,<title>elsewhere</title>")
    attempt = """async ([path, method]) => fetch(path, {method, body: method === "POST" ? "{}" : undefined})
      .then(() => "read", () => "refused")"""
    for path, method in (("", "GET"), ("_dash-update-component", "POST")):
        assert tab.page.evaluate(attempt, [tab.url + path, method]) == "refused"
    tab.complaints.clear()


def test_a_request_without_end_is_refused(url: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": "8000000000"}
    assert ask(url, "POST", "/_dash-update-component", headers)[0].status == 413
