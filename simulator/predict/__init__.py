"""From a grid of models, devices, settings and families to rows, and from rows to advice, frontiers and sweeps."""
