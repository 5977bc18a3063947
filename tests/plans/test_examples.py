"""The library that is shipped as an example: it is of the model, complete and plausible."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.models.library import load_model
from simulator.plans.library import EXAMPLES, check_values, read_library

pytestmark = pytest.mark.quick

FOLDER = EXAMPLES


def test_smollm2_has_a_score_of_each_variant_of_each_layer() -> None:
    library = read_library(FOLDER / "smollm2-135m.csv", load_model("smollm2-135m"))
    assert library.notes == ()
    assert set(library.values) == {"kl_div", "perplexity"}
    for layer in range(30):
        texts = library.texts(layer)
        assert len(texts) == 11
        assert {("dense", "dense"), ("kv=1", "dense"), ("none", "dense"), ("dense", "none")} < set(texts)
        kl, perplexity = (check_values(library, name)[layer] for name in ("kl_div", "perplexity"))
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert kl[1:].min() > 1e-4
        assert perplexity[0] == np.min([column[0] for column in library.values["perplexity"]])
        widths = sorted((int(mlp), kl[i]) for i, (_, mlp) in enumerate(texts) if mlp.isdigit())
        assert widths[0][1] > widths[-1][1]  # a narrower MLP loses more


def test_its_origin_is_stated() -> None:
    text = (FOLDER / "smollm2-135m.md").read_text(encoding="utf-8")
    protocol = (FOLDER / "smollm2-135m.csv").read_text(encoding="utf-8").splitlines()[1]
    assert protocol.split("(")[-1].rstrip(")") in text  # the digest of the weights
    assert "prunesim quality" in text
