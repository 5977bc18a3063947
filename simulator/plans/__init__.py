"""Choose a variant for each layer: costs of variants, and a search under targets."""
