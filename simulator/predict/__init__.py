"""From a grid of models, devices, settings and families to rows, and what is asked of rows: advice, claims, sweeps."""
