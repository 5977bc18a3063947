"""Records and a datasheet to a calibrated profile."""
