"""Hardware profiles as data: one YAML file a device, read by :func:`simulator.load_hardware`."""
