"""How well profiles and engines predict data that no fit used: sets of such data, and one scorer
for all sets."""
