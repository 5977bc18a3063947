"""A plan, run on a device: timings as records, whatever the device does."""
