"""A hardware profile to fill in: :func:`new_hardware`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from string import Template

from simulator.errors import InputError
from simulator.files.write import write_whole
from simulator.hardware.library import shipped_names
from simulator.hardware.profile import ARCHITECTURES
from simulator.hardware.schema import NAME, SCHEMA_VERSION, plain_name

_TEMPLATE = Template("""\
# A GPU by its datasheet. Put a value in the place of each FILL_IN, then: prunesim hardware check $file
schema_version: $version
name: $name
title: "$name"  # as its vendor calls it
vendor: NVIDIA
# Whose defaults hold until it is calibrated: $architectures
architecture: FILL_IN
aliases: []  # other names, each in double quotes: what nvidia-smi prints, for one
# A shipped GPU with the same chip lends what was fitted on it:
# stacks_of: h100_sxm
sources:
  datasheet: "FILL_IN"  # title and address, for whoever looks it up
datasheet:
  sm_count: {value: FILL_IN, source: datasheet}  # streaming multiprocessors, or compute units
  boost_clock: {value: FILL_IN GHz, source: datasheet}  # the clock its rates below are stated at
  # The highest clock that the driver allows (nvidia-smi --query-gpu=clocks.max.sm): no prediction passes it.
  # max_clock: {value: FILL_IN GHz, source: datasheet}
  memory: {value: FILL_IN GB, source: datasheet}
  bandwidth: {value: FILL_IN GB/s, source: datasheet}
  l2_cache: {value: FILL_IN MiB, source: datasheet}  # the last cache that all of it shares
  power: {value: FILL_IN W, source: datasheet}
  # Dense rates (many datasheets print those of 2:4 sparsity, twice as high) with sums in fp32 (GeForce cards run fp16
  # and bf16 at half their rate then); sparse_factor is 2 where 2:4 doubles the rate. The same for what it has of
  # tf32, fp8, int8 and nvfp4.
  rates:
    fp32: {value: FILL_IN TFLOP/s, accumulate: fp32, sparse_factor: 1, source: datasheet}
    fp16: {value: FILL_IN TFLOP/s, accumulate: fp32, sparse_factor: 2, source: datasheet}
    bf16: {value: FILL_IN TFLOP/s, accumulate: fp32, sparse_factor: 2, source: datasheet}
  # For more devices than one: bandwidth in one direction, latency of one message.
  # link:
  #   kind: nvlink4
  #   max_devices: 8
  #   bandwidth: {value: FILL_IN GB/s, source: datasheet}
  #   latency: {value: FILL_IN us, source: datasheet}
""")


def new_hardware(name: str, path: str | os.PathLike[str] = "") -> Path:
    """Write a commented profile of a GPU to fill in, by default to NAME.yaml in the working folder; returns its path.

    Raises InputError where the name is none or that of a shipped GPU, or where the file is there already.
    """
    named = plain_name(name)
    if not re.fullmatch(NAME.pattern, named):
        raise InputError(f"hardware name {name!r}: expected {NAME.right}")
    if named in shipped_names():
        raise InputError(f"hardware name {name!r} is that of {shipped_names()[named]}, which ships; use another")
    path = Path(path or f"{named}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: expected a file name that ends in .yaml")
    if path.exists():
        raise InputError(f"{path} is there already; name another file, or remove it first")
    facts = {"file": path, "name": named, "version": SCHEMA_VERSION, "architectures": ", ".join(ARCHITECTURES)}
    write_whole(path, _TEMPLATE.substitute(facts).encode())
    return path
