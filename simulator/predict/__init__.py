"""From scenarios, prunings and devices to results, and what is built on results: advice, frontiers, sweeps."""
