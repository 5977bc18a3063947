"""How the generated pages lay out text in tables: :func:`left` for columns of words, :func:`cell` for text inside a cell."""

from __future__ import annotations


def left(markdown: str, *columns: int) -> str:
    """A Markdown table with these columns aligned left, counted from 0; :func:`calibration.judge.report.table` aligns all but the first right.

    >>> print(left("| a | b |\\n| --- | ---: |\\n| x | y |", 1))
    | a | b |
    | --- | --- |
    | x | y |
    """
    head, rule, *rows = markdown.split("\n")
    cells = rule.strip("| ").split(" | ")
    for column in columns:
        cells[column] = "---"
    return "\n".join([head, f"| {' | '.join(cells)} |", *rows])


def cell(text: str) -> str:
    """Text as one table cell: on one line, its bars escaped.

    >>> cell("a |\\n b")
    'a \\\\| b'
    """
    return " ".join(text.split()).replace("|", "\\|")
