"""Define the subject of a paper's figures: model, devices and settings, and their text in captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError
from simulator.figures.titles import engine_title, model_title
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.prediction.scenario import Scenario, profiles

if TYPE_CHECKING:
    from simulator.figures.measured import MeasuredGemms

Made = tuple[Any, str, tuple[str, ...]]
"""A figure, its caption, and notes."""


class NothingToDraw(InputError):
    """A figure without data; the message names the required data."""


@dataclass(frozen=True)
class Paper:
    """The subject of a paper."""

    model: ModelConfig
    devices: tuple[HardwareProfile, ...]
    scenario: Scenario = field(default_factory=Scenario)  # number formats, engine
    seq: int = 2048  # tokens of a prompt, or positions of a cache, if a figure does not vary them
    measured: Mapping[str, MeasuredGemms] = field(default_factory=dict)  # by device, to compare with predictions

    @property
    def title(self) -> str:
        """Title of the model."""
        return model_title(self.model.name)

    @property
    def scenario_text(self) -> str:
        """Model, number format and engine in words."""
        return f"{self.title}, {self.scenario.dtype}, {engine_title(self.scenario.engine_name)}"

    @property
    def interval(self) -> str:
        """Label of bars and bands."""
        return f"{100 * self.scenario.level:.4g} % interval"


def paper(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    *,
    scenario: Scenario | None = None,
    seq: int = 2048,
    measured: Mapping[str, MeasuredGemms] | None = None,
) -> Paper:
    """Return a paper about a model on some devices, with names resolved."""
    devices = tuple(profiles(hardware))
    config = load_model(model) if isinstance(model, str) else model
    return Paper(config, devices, scenario or Scenario(), seq, measured or {})
