"""The server answers what the page asks; anything else is refused with a status from 400 to 499 and no traceback."""

from __future__ import annotations

import gc
import json
import tracemalloc
from typing import Any

import pytest

from simulator.explore.questions import CALLBACKS, has_few_values

pytest.importorskip("dash")


@pytest.fixture(scope="module")
def client() -> Any:
    from simulator.explore.app import make_app

    server = make_app().server
    server.testing = True  # an exception of the server is one here
    return server.test_client()


def post(client: Any, body: Any, kind: str = "application/json") -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body)
    return client.post(CALLBACKS, data=content, content_type=kind)


FILE = {"name": "a.json", "text": "{}", "room": 0}


def question(source: str = "csv-asked", target: str = "csv", value: Any = None, **changes: Any) -> dict[str, Any]:
    value = {"search": "?family=depth&sparsity=0.25&detail=depth", "narrow": False} if value is None else value
    place = {"id": target, "property": "data"}
    asked = {"id": source, "property": "data", "value": value}
    return {"output": f"{target}.data", "outputs": place, "inputs": [asked], "changedPropIds": [], **changes}


def dropped(files: Any, into: Any = "model") -> dict[str, Any]:
    return question("dropped", "accepted", {"into": into, "files": files, "at": 1})


@pytest.mark.quick
def test_what_the_page_asks_is_answered(client: Any) -> None:
    answer = post(client, question())
    assert "model,hardware,engine" in answer.get_json()["response"]["csv"]["data"]["content"]
    assert (
        "a.json" in post(client, dropped([{**FILE, "text": "{"}])).get_json()["response"]["accepted"]["data"]["error"]
    )


def test_answers_do_not_fill_the_memory(client: Any) -> None:
    """After 60 answers as many objects are alive as after 15: a server may run for days."""
    alive: list[int] = []
    for batch in range(1, 21):
        selection = {"search": f"?batch={batch}&gpu=h100,a100&phase=decode", "narrow": False}
        for source, target in (("asked", "answered"), ("wanted", "map"), ("csv-asked", "csv")):
            assert post(client, question(source, target, selection)).status_code == 200
        if batch in (5, 20):
            gc.collect()
            alive.append(len(gc.get_objects()))
    assert alive[1] < 1.05 * alive[0]


@pytest.mark.quick
def test_a_map_that_takes_long_is_a_line(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.explore.app.map_chart", lambda *_: pytest.fail("was computed"))
    selection = {"search": "?phase=generate&new=1024", "narrow": False}
    answer = post(client, question("wanted", "map", selection)).get_json()["response"]["map"]["data"]
    (note,) = answer["figure"]["layout"]["annotations"]
    assert (
        note["text"]
        .replace("<br>", " ")
        .startswith("map: expected at most 250,000 passes to compute, got 334,368; select fewer")
    )
    assert answer["asked"] == selection


BODIES = (
    *(b"", b"{", b"[]", b"1", b"null", b"\xff\xfe", b'"\\ud800"', b"[" * 100_000, b'{"a":' * 100_000),
    *({}, {"output": "csv.data"}, question(output="none.data"), question(output=["csv.data"]), question(outputs=[])),
    *(question(inputs=inputs) for inputs in (None, [], {}, [1], [{"id": "csv-asked"}], question()["inputs"] * 2)),
    *(question(changedPropIds=ids) for ids in (None, [1])),
    *(question(value=value) for value in (1, "x", [], {"search": "?"}, {"search": 1, "narrow": False})),
    question(value={"search": "", "narrow": float("nan")}),
    question(source="asked"),
    *(dropped(files) for files in (1, {}, None, [1], [{}])),
    *(dropped([{**FILE, **change}]) for change in ({"name": 1}, {"name": {}}, {"text": None}, {"room": 0.5})),
    dropped([FILE], into=1),
    question(state=[1]),
)


@pytest.mark.quick
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_malformed_question_is_refused(body: Any, client: Any) -> None:
    assert post(client, body).status_code == 400


@pytest.mark.quick
def test_other_kinds_sizes_and_files_are_refused(client: Any) -> None:
    assert post(client, question(), "text/plain").status_code == 400
    assert post(client, b" " * 50_000_000).status_code == 413
    for path in ("nobody/x.js", "dash/../x", "plotly/package_data/none.js"):
        assert client.get(f"/_dash-component-suites/{path}").status_code == 404


@pytest.mark.quick
@pytest.mark.parametrize("part", [b"[],", b'{"a":1},', b'"",', b"1,", b'"\\"",[],'])
def test_a_request_of_many_values_is_refused_before_it_is_parsed(part: bytes, client: Any) -> None:
    body = b"[" + part * (8_000_000 // len(part)) + b"1]"
    tracemalloc.start()
    try:
        status = post(client, body).status_code
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status == 400
    assert peak < 5 * len(body)  # parsed, it has up to 30 times its size


@pytest.mark.quick
def test_values_in_another_encoding_are_counted_too(client: Any) -> None:
    hidden = json.dumps('"') + ","  # an escaped quote, of which UTF-16 has other bytes
    body = f"[{hidden}{'[],' * 300_000}1]".encode("utf-16-le")
    assert not has_few_values(body)
    assert post(client, body).status_code == 400


@pytest.mark.quick
def test_texts_of_files_do_not_count_as_values(client: Any) -> None:
    header = '[{},"\\\\"' * 100_000
    files = [{**FILE, "name": "config.json"}, {**FILE, "name": "a.safetensors", "text": header}]
    answer = post(client, dropped(files)).get_json()["response"]["accepted"]["data"]
    assert answer["error"].startswith("a.safetensors: is not JSON")


@pytest.mark.quick
def test_many_files_are_counted_before_anything_else(client: Any) -> None:
    answer = post(client, dropped([{**FILE, "name": f"{i}.safetensors"} for i in range(5000)]))
    assert answer.get_json()["response"]["accepted"]["data"]["error"] == "5000 files: expected at most 4098"
