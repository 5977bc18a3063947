"""Published measurements of whole models and collectives, which evidence alone reads, and readers
of tables that do not ship. The rows of ``serving.csv`` were selected as PROVENANCE.yaml of
``calibration/measurements`` states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import calibration.measurements as installed

FOLDER = Path(__file__).resolve().parent
PUBLISHED: Mapping[str, Path] = {
    **installed.PUBLISHED,
    "dense": FOLDER / "published_dense.csv",
    "speedups": FOLDER / "published_speedups.csv",
    "throughput": FOLDER / "published_throughput.csv",
    "collectives": FOLDER / "published_collectives.csv",
    "serving": FOLDER / "serving.csv",
    "at_once": FOLDER / "at_once.csv",
    "steady": FOLDER / "steady.csv",
}


def published(name: str) -> list[dict[str, str]]:
    """Return the rows of a table of :data:`PUBLISHED` as text, each with its source.

    Values are SI unless the row has a ``unit``. ``assumed`` lists facts that the source does not
    state, ``reason`` the likely reason of a large error, ``left_out`` why a row cannot be predicted
    (empty: it can). Parameters of an engine are fitted on rows with ``split`` "fit" and evaluated
    on rows with "judge"; no source is in both; rows with "shown" are not counted. ``metric`` is
    time_s (of a prefill or a step), tokens_per_s (new tokens of all sequences over the total time,
    or over a decode step) or all_tokens_per_s (prompt and new tokens). ``own_code`` marks a pruned
    model that ran other modelling code than the dense model; it prunes the layers ``first_layer``
    to ``last_layer``.
    """
    return installed.published(name, PUBLISHED)
