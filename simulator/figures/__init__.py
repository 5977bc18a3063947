"""Draw figures from arrays and labels."""
