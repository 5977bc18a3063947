"""Write a hardware profile to fill in: :func:`new_hardware`."""

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
# Datasheet facts of a GPU. Replace each FILL_IN, then run: prunesim hardware check $file
schema_version: $version
name: $name
title: "$name"  # name as the vendor writes it
vendor: NVIDIA
# Its defaults are used until the GPU is calibrated. One of: $architectures
architecture: FILL_IN
aliases: []  # other names, each in double quotes, such as the name that nvidia-smi prints
# A shipped GPU with the same chip, whose fitted values are inherited:
# stacks_of: h100_sxm
sources:
  datasheet: "FILL_IN"  # title and address
datasheet:
  sm_count: {value: FILL_IN, source: datasheet}  # streaming multiprocessors, or compute units
  boost_clock: {value: FILL_IN GHz, source: datasheet}  # clock of the rates below
  # Highest clock that the driver allows (nvidia-smi --query-gpu=clocks.max.sm); it limits every prediction.
  # max_clock: {value: FILL_IN GHz, source: datasheet}
  memory: {value: FILL_IN GB, source: datasheet}
  bandwidth: {value: FILL_IN GB/s, source: datasheet}
  l2_cache: {value: FILL_IN MiB, source: datasheet}  # last cache that all multiprocessors share
  power: {value: FILL_IN W, source: datasheet}
  # Dense rates with sums in fp32. Many datasheets print rates of 2:4 sparsity, which are twice as high. GeForce cards
  # halve their fp16 and bf16 rates for sums in fp32. sparse_factor is 2 if 2:4 doubles the rate. Add tf32, fp8, int8
  # and nvfp4 if the GPU has them.
  rates:
    fp32: {value: FILL_IN TFLOP/s, accumulate: fp32, sparse_factor: 1, source: datasheet}
    fp16: {value: FILL_IN TFLOP/s, accumulate: fp32, sparse_factor: 2, source: datasheet}
    bf16: {value: FILL_IN TFLOP/s, accumulate: fp32, sparse_factor: 2, source: datasheet}
  # For several devices: bandwidth in one direction, latency of one message.
  # link:
  #   kind: nvlink4  # or pcie5, xgmi
  #   connection: {value: pcie-host, source: datasheet}  # PCIe without peer access; else by kind
  #   max_devices: 8
  #   bandwidth: {value: FILL_IN GB/s, source: datasheet}
  #   latency: {value: FILL_IN us, source: datasheet}
  # For cards with connectors for an NVLink bridge between two of them (--link bridge).
  # bridge:
  #   kind: nvlink4
  #   bandwidth: {value: FILL_IN GB/s, source: datasheet}
  #   latency: {value: FILL_IN us, source: datasheet}
""")


def new_hardware(name: str, path: str | os.PathLike[str] = "") -> Path:
    """Write a commented profile to fill in, by default to NAME.yaml in the working folder, and return its path.

    Raises InputError if the name is invalid or a shipped GPU's, or if the file exists.
    """
    named = plain_name(name)
    if not re.fullmatch(NAME.pattern, named):
        raise InputError(f"hardware name {name!r}: expected {NAME.right}")
    if named in shipped_names():
        raise InputError(f"hardware name {name!r} is a name of the shipped {shipped_names()[named]}; use another")
    path = Path(path or f"{named}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: expected a file name that ends in .yaml")
    if path.exists():
        raise InputError(f"{path}: expected a new file, but it exists; choose another name or remove it")
    facts = {"file": path, "name": named, "version": SCHEMA_VERSION, "architectures": ", ".join(ARCHITECTURES)}
    write_whole(path, _TEMPLATE.substitute(facts).encode())
    return path
