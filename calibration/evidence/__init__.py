"""How well profiles and engines predict data that no fit used, and what makes the shipped tables,
profiles and generated pages. No wheel contains this package."""
