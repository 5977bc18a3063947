"""The page in a real browser: keyboard, windows of all sizes, the report, several tabs, the end, and whoever else might
ask."""

from __future__ import annotations

import http.client
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from explore_browser import CLASHES, LAPTOP, OUTSIDE, PHONE, Tab, check, needs_browser, predicted, prunesim, start
from test_explore_state import TINY

from simulator.explore.charts import CARDS
from simulator.explore.dropped import token
from simulator.explore.state import KEYS, State
from simulator.pruning import FAMILIES

pytestmark = needs_browser


# -- keyboard ----------------------------------------------------------------------------------------------------------

FOCUS = """() => {
  const e = document.activeElement, data = e.dataset;
  const style = getComputedStyle(e.type === "radio" ? e.nextElementSibling : e);
  const box = (e.type === "radio" ? e.nextElementSibling : e).getBoundingClientRect();
  const all = [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']")];
  const button = data.save || (("csv" in data) ? "csv" : ("copy" in data) ? "copy" : e.className || e.tagName);
  const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  return {
    name: e.name || e.id || button, place: all.indexOf(e), seen: ring && box.right > 0 && box.width > 0,
    inside: box.top < innerHeight && box.bottom > 0,
  };
}"""


def test_everything_can_be_reached_by_keyboard(tab: Tab) -> None:
    tab.open("?phase=generate")
    reached: list[dict[str, Any]] = []
    for _ in range(120):
        tab.page.keyboard.press("Tab")
        at = tab.page.evaluate(FOCUS)
        if at["name"] == "BODY" or (reached and at["place"] <= reached[-1]["place"]):
            break
        reached.append(at)
    names = [at["name"] for at in reached]
    assert names[0] == "skip"
    assert {*KEYS, *CARDS, "choose", "csv", "table", "copy"} <= set(names)
    assert names.count("family") == len(FAMILIES)
    assert names.count("phase") == names.count("runtime") == 1, "radios are one stop, arrow keys go on"
    assert all(at["seen"] for at in reached), [at["name"] for at in reached if not at["seen"]]
    assert all(at["inside"] for at in reached), "what has the focus is scrolled to"


def test_the_keyboard_alone_changes_the_page(tab: Tab) -> None:
    tab.open()
    keyboard = tab.page.keyboard
    for selector, act, keys in (
        ("[name=phase]:checked", keyboard.press, "ArrowRight"),
        ("[name=family][value=kv_cache]", keyboard.press, "Space"),
        ("#model", keyboard.type, "qwen3-8"),
        ("#batch", keyboard.press, "ArrowUp"),
    ):
        tab.page.locator(selector).focus()
        act(keys)
        tab.settle()
    check(tab, State(model="qwen3-8b", phase="decode", batch=2, families=(*State().families, "kv_cache")))


def test_the_skip_link_leads_to_the_results(tab: Tab) -> None:
    tab.open("?batch=2")
    tab.page.keyboard.press("Tab")
    assert tab.page.locator(".skip").bounding_box()["x"] >= 0
    tab.page.keyboard.press("Enter")
    assert tab.page.evaluate("document.activeElement.id") == "results"
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.dataset.save") == "speedup"
    tab.fill(seq=100)
    check(tab, State(batch=2, seq=100))


# -- windows of all sizes ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "default": "",
    "every family on three GPUs": f"?gpu=a100_sxm_80gb,h100_sxm,rtx_4090&family={','.join(FAMILIES)}",
    "generate": "?phase=generate&new=16&gpu=h100_sxm,rtx_4090&runtime=eager",
    "decode at batch 64": "?phase=decode&batch=64&detail=depth",
    "long names": "?model=" + token(json.dumps({**TINY, "_name_or_path": "x" * 90}), "y" * 90 + ".json"),
    "refused": "?gpu=a100_sxm_80gb&dtype=fp8",
    "problems": "?batch=x&gpu=h10&model=" + "z" * 200,
}
SIZES: dict[str, Any] = {
    "laptop": {"viewport": LAPTOP},
    "phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True},
}


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_cut_and_no_label_lies_on_another(size: str, new_tab: Callable[..., Tab]) -> None:
    tab = new_tab(**SIZES[size])
    for name, query in LAYOUTS.items():
        tab.open(query)
        assert tab.page.evaluate(OUTSIDE) == [], name
        assert tab.page.evaluate(CLASHES) == [], name
    if size == "phone":
        tab.page.click("summary")
        assert tab.page.evaluate(OUTSIDE) == []
        touched = "[...document.querySelectorAll('form button, form select, form .field input')]"
        heights = tab.page.evaluate(touched + ".map((e) => e.getBoundingClientRect().height)")
        assert min(height for height in heights if height) >= 24


def test_a_window_that_becomes_narrow_is_drawn_again(tab: Tab) -> None:
    tab.open("?gpu=h100_sxm,rtx_4090")
    wide = tab.page.locator("#speedup").bounding_box()["height"]
    tab.page.set_viewport_size(PHONE)
    tab.page.wait_for_timeout(300)
    tab.settle()
    assert tab.page.locator("#speedup").bounding_box()["height"] > 1.4 * wide
    assert tab.page.evaluate(OUTSIDE) == []


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_a_report_needs_no_network(size: dict[str, int], new_tab: Callable[..., Tab], tmp_path: Path) -> None:
    options = ("--hardware", "h100,rtx_4090", "--phase", "decode", "-o", "r.html")
    done = prunesim("report", "llama-3.1-8b", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "r.html\n"), done.stderr
    tab = new_tab(offline=True, viewport=size)
    tab.page.goto((tmp_path / "r.html").as_uri())
    records = predicted(State(gpus=("h100_sxm", "rtx_4090"), phase="decode"))
    curves = [t for t in tab.figure("speedup")["data"] if "markers" in t["mode"] and t["name"] == "depth"]
    for curve, gpu in zip(curves, ("h100_sxm", "rtx_4090"), strict=True):
        assert curve["y"] == [r.speedup for r in records if (r.family, r.hardware) == ("depth", gpu)]
    assert all(figure["drawn"] for figure in tab.figures())
    assert len(tab.table()) == 1 + len(records)
    assert tab.page.evaluate(OUTSIDE) == []
    assert tab.page.evaluate(CLASHES) == []
    assert tab.requests == [(tmp_path / "r.html").as_uri()]


# -- more than one at once, and ends -----------------------------------------------------------------------------------


def test_two_tabs_do_not_mix(new_tab: Callable[..., Tab]) -> None:
    one, two = new_tab().open(), new_tab().open("?phase=decode")
    for i in range(2, 6):
        one.page.fill("#batch", str(i))
        two.page.fill("#batch", str(10 * i))
    for tab, state in ((one, State(batch=5)), (two, State(phase="decode", batch=50))):
        tab.settle()
        check(tab, state)


def test_the_last_of_many_quick_changes_is_shown(tab: Tab) -> None:
    tab.open("?phase=generate&gpu=h100_sxm,a100_sxm_80gb&new=64")
    for i in range(2, 12):
        tab.page.fill("#batch", str(i))
    tab.settle()
    check(tab, State(phase="generate", gpus=("a100_sxm_80gb", "h100_sxm"), new_tokens=64, batch=11))
    frames = [s for s in tab.figure("crossover")["layout"].get("shapes", []) if s["type"] == "rect"]
    assert not frames, "11 is no batch of the map"


def test_a_port_that_is_taken_is_one_line(url: str) -> None:
    done = prunesim("explore", "--no-browser", "--port", str(urlsplit(url).port))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"prunesim: port \d+ is taken; choose another one with --port.*\n", done.stderr)


def test_ctrl_c_ends_it_and_the_page_says_so(browser: Any) -> None:
    with start("--port", "0") as process:
        assert process.stdout is not None
        tab = Tab(browser.new_page(), json.loads(process.stdout.readline())["url"]).open()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, "Ctrl-C stops it\n")
    tab.page.fill("#batch", "3")
    tab.page.locator("#problems", has_text="is prunesim explore still running?").wait_for()
    tab.page.context.close()


# -- nobody else -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "127.0.0.1:{port}.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "iframe"}, 403),
    ],
)
def test_only_its_own_page_is_answered(url: str, headers: dict[str, str], status: int) -> None:
    port = urlsplit(url).port
    for path in ("/", "/_dash-layout"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", path, headers={name: value.format(port=port) for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == status
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
        assert status == 200 or b"prunesim" not in body


def test_another_page_can_neither_read_nor_ask(tab: Tab) -> None:
    tab.page.goto("data:text/html,<title>elsewhere</title>")
    attempt = """async ([path, method]) => fetch(path, {method, body: method === "POST" ? "{}" : undefined})
      .then(() => "read", () => "refused")"""
    for path, method in (("", "GET"), ("_dash-update-component", "POST")):
        assert tab.page.evaluate(attempt, [tab.url + path, method]) == "refused"
    tab.complaints.clear()


def test_a_request_without_end_is_refused(url: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=20)
    connection.putrequest("POST", "/_dash-update-component")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "8000000000")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
