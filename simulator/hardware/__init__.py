"""A device as data: facts of its datasheet, what was fitted on it, and the YAML and arrays both are kept in."""
