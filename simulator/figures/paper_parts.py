"""What the figures of a paper have in common: its model, devices and settings, and the words that captions use for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.predict.settings import Setting

if TYPE_CHECKING:
    from simulator.figures.paper_measured import MeasuredGemms
    from simulator.predict.rows import Record

Made = tuple[Any, str, tuple[str, ...]]
"""A figure, its caption, and notes."""


class NothingToDraw(InputError):
    """A figure whose data are not at hand; says what it needs."""


@dataclass(frozen=True)
class Paper:
    """What a paper is about.

    Attributes
    ----------
    model : ModelConfig
    devices : tuple of HardwareProfile
    setting : Setting
        Number formats, runtime.
    seq : int
        Tokens of a prompt, or positions of a cache, where a figure does not vary them.
    measured : mapping from a device's name to MeasuredGemms
        Measured GEMMs to show beside predictions.
    """

    model: ModelConfig
    devices: tuple[HardwareProfile, ...]
    setting: Setting = field(default_factory=Setting)
    seq: int = 2048
    measured: Mapping[str, MeasuredGemms] = field(default_factory=dict)


def paper(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    *,
    setting: Setting | None = None,
    seq: int = 2048,
    measured: Mapping[str, MeasuredGemms] | None = None,
) -> Paper:
    """A paper about a model on some devices, names resolved.

    Examples
    --------
    >>> paper("llama-3.1-8b", ["h100", "h100_sxm"]).devices[0].name
    'h100_sxm'
    """
    profiles = {hw.name: hw for hw in (load_hardware(h) if isinstance(h, str) else h for h in hardware)}
    if not profiles:
        raise InputError("hardware: expected at least one")
    config = load_model(model) if isinstance(model, str) else model
    return Paper(config, tuple(profiles.values()), setting or Setting(), seq, measured or {})


def setting_text(p: Paper) -> str:
    """Number formats and runtime in words."""
    runtime = "CUDA graphs" if p.setting.runtime == "cuda_graph" else "eager mode"
    return f"{p.model.name}, {p.setting.dtype}, {runtime}"


def interval_text(p: Paper) -> str:
    return f"{100 * p.setting.level:.4g} % interval"


def columns_of(p: Paper) -> int | None:
    return len(p.devices) if len(p.devices) in (2, 3) else None


def where_text(r: Record) -> str:
    return f"{r.phase}, batch {r.batch}"


def percents(values: Sequence[float]) -> str:
    texts = [f"{100 * v:.4g}" for v in values]
    return f"{', '.join(texts[:-1])} and {texts[-1]} %" if len(texts) > 1 else f"{texts[0]} %"
