"""What each kernel takes: equal-length arrays and a profile in, times with their limits out. No file, no model."""
