"""The page of claims is current, and the chosen threshold separates most changes from what was
published."""

from __future__ import annotations

import pytest

from calibration.evidence.claims import AS_PUBLISHED, NOTABLE, claim_tables, judged_claims
from calibration.evidence.pages import DOCS, filled

pytestmark = pytest.mark.slow


def test_the_page_of_claims_is_current() -> None:
    assert filled("claims", claim_tables()) == (DOCS / "claims.md").read_text("utf-8")


def test_sources_that_did_not_choose_the_threshold_have_few_false_alarms() -> None:
    rows = [j for j in judged_claims() if not j.chooses and j.moved >= NOTABLE]
    plain = [j.judgement.unlikely for j in rows if j.change == AS_PUBLISHED]
    changed = [j.judgement.unlikely for j in rows if j.change in ("phase", "batch", "prefix")]
    assert sum(plain) <= 0.1 * len(plain)
    assert sum(changed) >= 0.75 * len(changed)
