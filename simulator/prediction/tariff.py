"""Energy of a prediction per token and per request, and what it costs: the one place of these
conversions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from simulator.arguments import Range
from simulator.display import Displayed
from simulator.request import Real
from simulator.units import parse_number

if TYPE_CHECKING:
    from simulator.prediction.requests import Predicted

KWH_J = 3.6e6
ENDS = ("", "_lower", "_upper")

PRICES: Mapping[str, Real] = {
    name: Real(Range(low, 1e6, expected), example, parse_number)
    for name, low, expected, example in (
        ("electricity", 0.0, "the price of a kWh, from 0 to 1e6, such as 0.15", "0.15"),
        ("carbon", 0.0, "g of CO2 per kWh, from 0 to 1e6, such as 400", "400"),
        ("pue", 1.0, "a factor from 1 to 1e6, such as 1.3", "1.3"),
        ("host_watts", 0.0, "W of the host per device, from 0 to 1e6, such as 100", "100"),
    )
}
"""Fields of :class:`Tariff`: the numbers that they accept."""


@dataclass(frozen=True)
class Tariff:
    """What energy costs, and what draws power besides the devices.

    Parameters
    ----------
    electricity : float, optional
        Price of a kWh, in any currency.
    carbon : float, optional
        Carbon dioxide per kWh, g.
    pue : float
        Power usage effectiveness: energy of the data centre over that of its servers, at least 1.
    host_watts : float
        Power of the host per device, W; it is drawn the whole time.

    Raises
    ------
    InputError
        For a value out of range.

    Examples
    --------
    >>> import simulator
    >>> r = simulator.predict("llama-3.1-8b", "depth 0.25", "h100", batch=8)
    >>> found = simulator.Energy.of(r, simulator.Tariff(electricity=0.15, pue=1.3))
    >>> found.pruned_joules_per_token < found.dense_joules_per_token
    True
    """

    electricity: Annotated[float | None, PRICES["electricity"]] = None
    carbon: Annotated[float | None, PRICES["carbon"]] = None
    pue: Annotated[float, PRICES["pue"]] = 1.0
    host_watts: Annotated[float, PRICES["host_watts"]] = 0.0

    def __post_init__(self) -> None:
        for name, accepts in PRICES.items():
            value = getattr(self, name)
            if value is not None or getattr(Tariff, name) is not None:
                accepts.check(name, value)

    @property
    def excluded(self) -> str:
        """What the energy excludes, and the options that add it."""
        parts = {
            "the host (--host-watts)": self.host_watts > 0.0,
            "cooling (--pue)": self.pue > 1.0,
        }
        return " and ".join(name for name, added in parts.items() if not added)

    def total(self, joules: Any, seconds: Any, devices: Any) -> Any:
        """Return the energy of ``devices`` that take ``joules`` in ``seconds``, with that of their
        hosts and of cooling."""
        return self.pue * (joules + self.host_watts * devices * seconds)

    def per_million(self, joules: Any) -> dict[str, Any]:
        """Return energy, cost and carbon of a million tokens that take ``joules`` each."""
        kwh = 1e6 * joules / KWH_J
        prices = {"cost": self.electricity, "carbon_g": self.carbon}
        return {
            "kwh_per_million_tokens": kwh,
            **{
                f"{name}_per_million_tokens": kwh * (np.nan if price is None else price)
                for name, price in prices.items()
            },
        }


NO_TARIFF = Tariff()


@dataclass(frozen=True, repr=False, kw_only=True)
class Energy(Displayed):
    """Energy of a prediction on all devices: per prompt token in prefill, else per new token.

    Energy includes the hosts and the cooling of a tariff; watts are those of a device.

    Parameters
    ----------
    dense_watts, pruned_watts : float
        Mean power of one device with the dense and with the pruned model, W.
    dense_joules_per_token, dense_joules_per_token_lower, dense_joules_per_token_upper : float
        Energy per token with the dense model, J, with the ends of its interval.
    pruned_joules_per_token, pruned_joules_per_token_lower, pruned_joules_per_token_upper : float
        Energy per token with the pruned model, J, with the ends of its interval.
    dense_joules_per_request, pruned_joules_per_request : float or None
        Energy per request, J; None in decode, which is a part of a request.
    dense_joules_per_request_lower, dense_joules_per_request_upper : float or None
        Ends of the interval of the energy per request with the dense model, J.
    pruned_joules_per_request_lower, pruned_joules_per_request_upper : float or None
        Ends of the interval of the energy per request with the pruned model, J.
    dense_tokens_per_joule, pruned_tokens_per_joule : float
        Tokens per J.
    dense_kwh_per_million_tokens, pruned_kwh_per_million_tokens : float
        Energy of a million tokens, kWh.
    dense_cost_per_million_tokens, pruned_cost_per_million_tokens : float or None
        Price of this energy; None without a price.
    dense_carbon_g_per_million_tokens, pruned_carbon_g_per_million_tokens : float or None
        Carbon dioxide of this energy, g; None without a value per kWh.
    energy_saved, energy_saved_lower, energy_saved_upper : float
        Share of the dense model's energy that the pruning saves, with the ends of its interval.

    Examples
    --------
    >>> import simulator
    >>> found = simulator.predict("llama-3.1-8b", "depth 0.25", "h100", batch=8).energy
    >>> found.pruned_joules_per_token < found.dense_joules_per_token
    True
    """

    dense_watts: float
    pruned_watts: float
    dense_joules_per_token: float
    dense_joules_per_token_lower: float
    dense_joules_per_token_upper: float
    pruned_joules_per_token: float
    pruned_joules_per_token_lower: float
    pruned_joules_per_token_upper: float
    dense_joules_per_request: float | None
    pruned_joules_per_request: float | None
    dense_joules_per_request_lower: float | None
    dense_joules_per_request_upper: float | None
    pruned_joules_per_request_lower: float | None
    pruned_joules_per_request_upper: float | None
    dense_tokens_per_joule: float
    pruned_tokens_per_joule: float
    dense_kwh_per_million_tokens: float
    pruned_kwh_per_million_tokens: float
    dense_cost_per_million_tokens: float | None
    pruned_cost_per_million_tokens: float | None
    dense_carbon_g_per_million_tokens: float | None
    pruned_carbon_g_per_million_tokens: float | None
    energy_saved: float
    energy_saved_lower: float
    energy_saved_upper: float

    @classmethod
    def of(cls, result: Predicted, tariff: Tariff = NO_TARIFF) -> Energy:
        """Return the energy of a prediction.

        Parameters
        ----------
        result : Result
            The prediction.
        tariff : Tariff
            Prices, and the power of hosts and cooling.

        Returns
        -------
        Energy
            The energy per token and per request, and its cost.

        Examples
        --------
        >>> import simulator
        >>> r = simulator.predict("llama-3.1-8b", "depth 0.25", "h100")
        >>> Energy.of(r, Tariff(pue=2.0)).dense_joules_per_token == 2.0 * r.dense_joules
        True
        """
        found = energy_of(vars(result), tariff)
        values: dict[str, Any] = {n: None if v != v else float(v) for n, v in found.items()}
        return cls(**values)

    def _title(self) -> str:
        dense, pruned = self.dense_joules_per_token, self.pruned_joules_per_token
        return f"{dense:.3g} to {pruned:.3g} J per token, {100.0 * self.energy_saved:.1f} % saved"


def energy_fields(result: Predicted, tariff: Tariff | None) -> dict[str, Any]:
    """Return the fields of a prediction's energy, if it is requested."""
    return {} if tariff is None else Energy.of(result, tariff).to_dict()


def energy_of(columns: Mapping[str, Any], tariff: Tariff = NO_TARIFF) -> dict[str, Any]:
    """Return the fields of :class:`Energy` from the columns of results, or the fields of one."""
    out = {**_of_model("dense", columns, tariff), **_of_model("pruned", columns, tariff)}
    hosts = tariff.host_watts * columns["devices"] * columns["dense_s"]
    share = hosts / (columns["dense_joules"] + hosts)
    for end in ENDS:
        saved, of_time = columns[f"energy_saved{end}"], 1.0 - 1.0 / columns[f"speedup{end}"]
        out[f"energy_saved{end}"] = (1.0 - share) * saved + share * of_time
    return out


def _of_model(model: str, columns: Mapping[str, Any], tariff: Tariff) -> dict[str, Any]:
    phase, requests = np.asarray(columns["phase"]), 1.0 * columns["batch"]
    new = np.maximum(columns["new_tokens"], 1)
    tokens = requests * np.where(phase == "prefill", columns["seq"], new)
    whole = np.where(phase == "decode", np.nan, requests)
    out = {f"{model}_watts": columns[f"{model}_watts"]}
    for end, time in zip(ENDS, ("_s", "_lower", "_upper")):
        joules, seconds = columns[f"{model}_joules{end}"], columns[f"{model}{time}"]
        total = tariff.total(joules, seconds, columns["devices"])
        out[f"{model}_joules_per_token{end}"] = total / tokens
        out[f"{model}_joules_per_request{end}"] = total / whole
    per_token = out[f"{model}_joules_per_token"]
    out[f"{model}_tokens_per_joule"] = 1.0 / per_token
    return out | {f"{model}_{name}": v for name, v in tariff.per_million(per_token).items()}
