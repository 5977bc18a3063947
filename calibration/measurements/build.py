"""Make the shipped tables from the published wheel (``wheel`` names it and the selected rows).

    python -m calibration.measurements.build aiconfigurator_core-0.12.0-*.whl

The same wheel gives the same bytes. PROVENANCE.yaml counts excluded rows by reason, and names the version of pyarrow,
because another version may encode differently.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.measurements import FOLDER, INDEX, PUBLISHED, file_name
from calibration.measurements.serving import MEMBER, serving_csv, serving_table, why_left_out
from calibration.measurements.wheel import CHOICES, PACKAGE, WHEEL_SHA256, open_wheel, read_choice, shipped_part
from calibration.records.parquet import write_records
from simulator.files.write import write_whole

LICENCE = "Apache-2.0"
COPYRIGHT = "Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES. All rights reserved."


def build(wheel: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the shipped tables and their index into a folder; return the index."""
    import pyarrow

    tables: dict[str, dict[str, Any]] = {}
    with open_wheel(wheel) as archive:
        for name, choice in CHOICES.items():
            if not choice.ships:
                continue
            records, left, refusals = read_choice(archive, choice)
            records, more = shipped_part(records, choice)
            extra = {
                "name": name,
                "package": PACKAGE,
                "copyright": COPYRIGHT,
                "licence": LICENCE,
                "modified": "see NOTICE",
            }
            content = write_records(records, extra=extra, single=True)
            write_whole(folder / file_name(name), content)
            source, labels = records.sources[0], records.labels().astype(str)
            ((framework, version),) = source.stack.items()
            tables[name] = {
                "file": file_name(name),
                "device": source.device,
                "framework": framework,
                "version": version,
                "kernels": [s.kernel for s in records.sources],
                "rows": {str(label): int((labels == label).sum()) for label in np.unique(labels)},
                "left_out": {**left, **more},
                "refused": dict(refusals),
                "path": choice.member,
                "licence": LICENCE,
                "copyright": COPYRIGHT,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        served = serving_table(archive)
    head = {
        "package": PACKAGE,
        "url": "https://pypi.org/project/aiconfigurator-core/0.12.0/",
        "wheel": wheel.name,
        "wheel_sha256": WHEEL_SHA256,
        "protocol": "CUDA graph replay, weights rotated over at most 6 copies, latency of one launch with its gap",
        "changes": "rows selected as said under each table; milliseconds to seconds in float32; GEMMs below 16 bits "
        "without the conversion of activations, weights alone without the time of a profiler; column names and order; "
        "copies added; sizes of collectives in bytes",
        "pyarrow": pyarrow.__version__,
    }
    content = serving_csv(served)
    write_whole(folder / PUBLISHED["serving"], content)
    serving = {
        "file": PUBLISHED["serving"],
        "rows": len(served),
        "left_out": dict(why_left_out(served)),
        "path": MEMBER,
        "licence": LICENCE,
        "copyright": COPYRIGHT,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    index = {**head, "serving": serving, "tables": tables}
    text = yaml.safe_dump(index, sort_keys=False, width=140, allow_unicode=True)
    write_whole(folder / INDEX, text.encode())
    return tables


def main() -> None:
    """Run the command of the module's docstring."""
    parser = argparse.ArgumentParser(description="Make the shipped measurement tables from the wheel of " + PACKAGE)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder for the tables")
    arguments = parser.parse_args()
    for name, entry in build(arguments.wheel, arguments.output).items():
        print(f"{name}: {sum(entry['rows'].values())} rows, {entry['bytes']} bytes")


if __name__ == "__main__":
    main()
