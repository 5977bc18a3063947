"""The report: its content, its size, and names with markup."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from simulator.cli import run
from simulator.explore import content as page
from simulator.explore.content import PageContent, cell, content, report_html
from simulator.prediction.explain import Explanation
from simulator.prediction.result import Result

LINE = (
    "llama-3.1-8b --hardware h100,a100 --family depth,width --sparsity 0.25,0.5 --phase decode"
    " --batch 1"
)


class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes, the cells of its tables, and its
    text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text, self.cell = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data

    @property
    def harmless(self) -> bool:
        """Whether it has no scripts, no handlers, and nothing that is fetched."""
        fetched = [
            value for name, value in self.attributes if name in ("src", "href", "xlink:href")
        ]
        handlers = [name for name, _ in self.attributes if name.startswith("on")]
        active = {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
        return not (
            active & set(self.elements)
            or handlers
            or [v for v in fetched if not (v or "").startswith("#")]
        )


def written(tmp_path: Path, words: str) -> str:
    path = tmp_path / "report.html"
    assert run(["report", *shlex.split(words), "-o", str(path)]) == 0
    return path.read_text(encoding="utf-8")


def test_a_report_opens_with_the_answer_and_has_the_numbers_of_speedup(
    tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / "report.html"
    assert cli.out(f"report {LINE} -o {file}") == f"{file}\n"
    html = file.read_text(encoding="utf-8")
    page = Page(html)
    assert (
        html.index('class="answer"')
        < html.index("<table>")
        < html.index("<svg")
        < html.index("<pre>")
    )
    assert page.elements.count("svg") == 3
    assert page.harmless
    rows = cli.json(f"speedup {LINE} --seq 2048")
    header, *cells = page.rows
    for name, key, unit in (
        ("speedup", "speedup", 1),
        ("lower", "speedup_lower", 1),
        ("upper", "speedup_upper", 1),
        ("dense (ms)", "dense_s", 1e3),
        ("pruned (ms)", "pruned_s", 1e3),
        ("roofline bound", "roofline_bound", 1),
        ("most sequences", "pruned_largest_batch", 1),
    ):
        assert [row[header.index(name)] for row in cells] == [
            cell(unit * row[key]) for row in rows
        ], name
    assert [row[header.index("hardware")] for row in cells] == [row["hardware"] for row in rows]


def test_the_commands_of_a_report_give_its_numbers(tmp_path: Path, cli: Any) -> None:
    words = (
        "llama-3.2-1b --hardware h100 --prune 'width mlp=0.3 + depth 0.25' --phase serve"
        " --concurrency 8"
    )
    words += " --new-tokens 16 --kv-dtype fp8 --dense-time 0.5s --ideal"
    html = written(tmp_path, words)
    lines = Page(html[html.index("<pre>") : html.index("</pre>")]).text.splitlines()
    assert [line.split()[1] for line in lines] == ["speedup", "explain", "report"]
    cli.capsys.readouterr()
    found = [cli.json(line.removeprefix("prunesim "))[0] for line in lines[:2]]
    (expected,) = cli.json(f"speedup {words}")
    for name in ("speedup", "speedup_lower", "dense_s", "batch", "new_tokens", "ideal", "kv_dtype"):
        assert [row[name] for row in found] == pytest.approx([expected[name]] * 2), name
    assert "will it run?" in html
    cli(lines[2].removeprefix("prunesim "))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html


@pytest.mark.parametrize("prune", ["depth 0.99", " + ".join(["depth 0.999"] * 6)])
def test_a_pruning_that_leaves_no_layer_has_a_report(tmp_path: Path, prune: str) -> None:
    html = written(tmp_path, f"llama-3.1-8b --hardware h100 --prune '{prune}' --phase decode")
    # and no warning of matplotlib: long names leave room for the figures
    assert "removes layers" in html
    assert html.count("<svg") == 3


def test_a_large_report_stays_below_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "llama-3.1-8b --hardware h100,a100,4090 --phase prefill,decode --batch 1,8,64 --sparsity"
        " 0.1:0.5:0.1"
    )
    html = written(tmp_path, words)
    assert len(html.encode()) < page.MOST_BYTES
    assert len(Page(html).rows) == 1 + page.MOST_ROWS
    assert "the first 500 rows" in html
    found = content(
        {"models": "llama-3.1-8b", "hardware": ["h100"], "family": ["depth"], "sparsity": [0.25]}
    )
    whole = len(report_html(found, ["x"]).encode())
    monkeypatch.setattr(page, "MOST_BYTES", whole - 1000)
    smaller = report_html(found, ["x"])
    assert len(smaller.encode()) < whole - 1000
    assert "omitted, too large" in smaller


def hostile(value: Any, markup: str) -> Any:
    """The same content with markup in every text."""
    if isinstance(value, str):
        return markup
    if isinstance(value, PageContent | Result):
        return replace(
            value, **{f.name: hostile(getattr(value, f.name), markup) for f in fields(value)}
        )
    if isinstance(value, Explanation):
        return replace(
            value, result=replace(hostile(value.result, markup), dtype=value.result.dtype)
        )
    if isinstance(value, tuple):
        return tuple(hostile(one, markup) for one in value)
    return (
        {name: hostile(one, markup) for name, one in value.items()}
        if isinstance(value, dict)
        else value
    )


def test_markup_in_every_text_is_harmless(hostile_model: Path) -> None:
    asked, markup = (
        {"models": "llama-3.1-8b", "hardware": ["h100", "a100"], "prune": ["depth 0.25"]},
        hostile_model.name,
    )
    found: PageContent = hostile(replace(content(asked), facts={"Model": "", markup: ""}), markup)
    page = Page(report_html(found, [markup]))
    assert page.harmless
    texts = (
        len(found.answer)
        + len(found.losses)
        + len(found.parts)
        + len(found.notes)
        + len(found.drawings)
    )
    assert page.text.count(markup) >= texts + 1 + 2 * len(found.rows)


def test_a_model_named_with_markup_is_harmless_in_figures_too(
    hostile_model: Path, tmp_path: Path
) -> None:
    html = written(
        tmp_path,
        f"{shlex.quote(str(hostile_model))} --hardware h100 --family depth,width --phase decode",
    )
    page = Page(html)
    assert page.harmless
    assert page.elements.count("svg") == 3
    assert hostile_model.name in page.text


LOAD = "llama-3.1-8b --hardware h100 --rate 5 --ttft 300ms --tpot 30ms --prune 'depth 0.25'"


def test_a_report_at_a_rate_has_the_answer_and_the_table_of_serve(tmp_path: Path, cli: Any) -> None:
    html = written(tmp_path, f"{LOAD} --phase serve")
    cli.capsys.readouterr()
    page = Page(html)
    assert page.harmless
    assert page.elements.count("svg") == 1
    header, dense, pruned = page.rows
    assert dense[:2] == ["dense", "1 x 1"]
    shown = cli.out(f"serve {LOAD}")
    printed = " ".join(shown.split())
    answer = html[html.index("<p class") : html.index('<div class="scroll')]
    assert "At 5 requests/s" in answer
    assert " ".join(Page(answer).text.split()) in printed
    for row in (dense, pruned):
        assert row[header.index("first token\n99 %")] in printed
    lines = Page(html[html.index("<pre>") : html.index("</pre>")]).text.splitlines()
    assert [line.split()[1] for line in lines] == ["serve", "report"]
    assert cli.out(lines[0].removeprefix("prunesim ")) == shown


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--rate 5", "expected phase serve"),
        ("--phase serve --tpot 30ms", "expected a rate"),
        ("--phase serve --rate 5 --concurrency 8", "expected no concurrency"),
        ("--phase serve --rate 5 --dense-time 1s", "dense time: expected none"),
        ("--phase serve --rate 5 --engine hf", "hf: expected an engine with a scheduler"),
    ],
)
def test_what_a_rate_cannot_have_is_refused(cli: Any, words: str, reason: str) -> None:
    assert reason in cli.refused(f"report llama-3.1-8b --hardware h100 {words} -o r.html")


def test_a_report_of_many_answers_opens_with_the_table_and_explains_the_least_efficient() -> None:
    prunings = ["width 0.3", "depth 0.3", "width_cross 0.3", "kv_cache 0.5"]
    asked = {
        "models": "llama-3.1-8b",
        "hardware": ["h100"],
        "prune": prunings,
        "seq": [2048, 32768],
    }
    found = content(asked)
    html = report_html(found, [])
    assert html.index("<table>") < html.index(found.answer[0])
    efficient = [r.speedup / r.roofline_bound for r in found.rows]
    least = found.rows[efficient.index(min(efficient))]
    assert (found.detail.pruning, found.detail.seq) == (least.pruning, least.seq)
    assert [line for line in found.answer if "stock vllm does not run it" in line] == [
        line for line in found.answer if line.startswith("kv_cache")
    ]
