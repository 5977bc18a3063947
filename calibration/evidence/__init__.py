"""How well profiles and engines predict data that their fits did not use: sets of such data, and one scorer for all."""
