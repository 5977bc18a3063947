"""Collectives of held-out systems by kind of connection: within their targets, with their usual coverage."""

from __future__ import annotations

import pytest

from calibration.validation.links import PUBLISHED_LINKS, TABLES, evaluate_link
from simulator.errors import InputError

MEDIAN = {  # percent, as docs/model.md has it
    "a100_sxm": 21.1,
    "h100_sxm": 7.5,
    "h200_sxm": 9.0,
    "b200_sxm": 19.3,
    "l40s": 30.6,
    "rtx_pro_6000": 16.1,
    "a100_dgx": 3.6,
    "a100_pairwise_nvlink": 12.3,
}


@pytest.mark.parametrize("system", [*TABLES, *PUBLISHED_LINKS])
def test_a_held_out_system_is_within_its_interval(system: str) -> None:
    found = evaluate_link(system)
    assert found["median"] == pytest.approx(MEDIAN[system], abs=0.3)
    assert found["coverage"] > 90


def test_an_unknown_system_is_named() -> None:
    with pytest.raises(InputError, match="a100_sxm"):
        evaluate_link("a100_sxmm")
