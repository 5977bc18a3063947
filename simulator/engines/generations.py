"""Generations of an engine: releases between which its host time or its kernels differ.

An engine file lists them from the oldest to the newest. Use :func:`split` for the parts of ``vllm@0.19`` and
:func:`selected` for the generation that a version or a name selects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulator.errors import InputError

_VERSION = re.compile(r"(\d{1,6}(?:\.\d{1,6}){0,5})(?:[.+-]?[a-z][a-z0-9.+-]{0,30})?", re.ASCII)
SINCE = r"\d{1,6}(\.\d{1,6}){0,5}"
"""Pattern of the first version of a generation."""


@dataclass(frozen=True)
class Generation:
    """Releases of an engine from one version on."""

    name: str
    since: str  # first version, such as "0.14"
    title: str
    source: str
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)  # fields of the engine that differ


def split(text: str) -> tuple[str, str]:
    """Return the name or path of an engine, and the version or generation after it ("" without one).

    >>> split("vllm@0.19"), split("vllm"), split("engines@home/mine.yaml"), split("mine.yaml@0.2")
    (('vllm', '0.19'), ('vllm', ''), ('engines@home/mine.yaml', ''), ('mine.yaml', '0.2'))
    """
    name, _, wanted = text.rpartition("@")
    if not name or not wanted.strip() or re.search(r"[/\\]|\.ya?ml$", wanted):
        return text, ""
    return name, wanted.strip().lower()


def numbers(version: str) -> tuple[int, ...] | None:
    """Return the numbers of a version, or None for other text. A suffix does not count: a release candidate and a
    post-release have the features of their release.

    >>> numbers("0.5.6.post2"), numbers("1.0.0rc3"), numbers("0.19.1+cu129"), numbers("next")
    ((0, 5, 6), (1, 0, 0), (0, 19, 1), None)
    """
    found = _VERSION.fullmatch(version)
    return tuple(int(part) for part in found.group(1).split(".")) if found else None


def selected(engine: str, generations: Sequence[Generation], wanted: str) -> Generation:
    """Return the generation of a name, or the newest that is not after a version; InputError for other text."""
    if not generations:
        raise InputError(f"engine '{engine}@{wanted}': {engine} has no generations; expected {engine}")
    for generation in generations:
        if generation.name == wanted:
            return generation
    version = numbers(wanted)
    since = [generation for generation in generations if version is not None and reached(version, generation.since)]
    if not since:
        names = ", ".join(f"{g.name} (from {g.since})" for g in generations)
        example = f"a version such as {generations[-1].since}"
        raise InputError(f"engine '{engine}@{wanted[:40]}': expected {example}, or a generation: {names}")
    return since[-1]


def reached(version: tuple[int, ...], since: str) -> bool:
    """Return whether a version is not before another.

    >>> reached((0, 8), "0.8.0"), reached((0, 10), "0.8"), reached((0, 7, 3), "0.8")
    (True, True, False)
    """
    first = numbers(since) or ()
    width = max(len(version), len(first))
    return version + (0,) * (width - len(version)) >= first + (0,) * (width - len(first))
