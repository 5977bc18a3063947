"""How accurate a profile is on what it did not see."""
