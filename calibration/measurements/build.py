"""Make the shipped tables from the published wheel (``wheel`` names it and the selected rows) and from the folder of
InferSim's files (``infersim``).

    python -m calibration.measurements.build aiconfigurator_core-0.12.0-*.whl ../shared/data/h20

The same sources give the same bytes. PROVENANCE.yaml counts excluded rows by reason, and names the version of pyarrow,
because another version may encode differently.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.measurements import FOLDER, INDEX, PUBLISHED, file_name, infersim
from calibration.measurements.infersim import SOURCES
from calibration.measurements.serving import MEMBER, serving_csv, serving_table, why_left_out
from calibration.measurements.wheel import CHOICES, PACKAGE, WHEEL_SHA256, open_wheel, read_choice, shipped_part
from calibration.records.parquet import write_records
from simulator.files.write import write_whole

LICENCE = "Apache-2.0"
COPYRIGHT = "Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES. All rights reserved."


def build(wheel: Path, others: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the tables that ship and their index into a folder; return the index. ``others`` is InferSim's folder."""
    import pyarrow

    tables: dict[str, dict[str, Any]] = {}
    with open_wheel(wheel) as archive:
        for name, choice in SOURCES.items():
            if not choice.ships:
                continue
            package, path, owner = PACKAGE, choice.member, COPYRIGHT
            if name in CHOICES:
                records, left, refusals = read_choice(archive, choice)
                records, more = shipped_part(records, choice)
                left |= more
            else:
                package, path, owner = infersim.REPOSITORY, choice.path, infersim.COPYRIGHT
                records, left, refusals = infersim.read_table(name, others)
            extra = {"name": name, "package": package, "copyright": owner, "licence": LICENCE, "modified": "see NOTICE"}
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
                "left_out": left,
                "refused": dict(refusals),
                "path": path,
                "licence": LICENCE,
                "copyright": owner,
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
    second = {"package": infersim.REPOSITORY, "url": infersim.URL, "protocol": "as said in each table's source"}
    second["unknown"] = "versions of the libraries; how MLA was timed; whether the GPU was otherwise idle"
    second["changes"] = (
        "rows selected as said under each table; microseconds to seconds in float32; column names and order"
    )
    index = {**head, "serving": serving, "infersim": second, "tables": tables}
    text = yaml.safe_dump(index, sort_keys=False, width=140, allow_unicode=True)
    write_whole(folder / INDEX, text.encode())
    return tables


def main() -> None:
    """Run the command of the module's docstring."""
    about = f"Make the shipped measurement tables from the wheel of {PACKAGE} and the files of {infersim.REPOSITORY}"
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("infersim", type=Path, help="folder of the files of InferSim")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder for the tables")
    arguments = parser.parse_args()
    for name, entry in build(arguments.wheel, arguments.infersim, arguments.output).items():
        print(f"{name}: {sum(entry['rows'].values())} rows, {entry['bytes']} bytes")


if __name__ == "__main__":
    main()
