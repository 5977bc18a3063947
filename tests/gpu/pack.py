"""Pack the folder of a run into one archive, without names of the machine, its user and its
folders.

``python pack.py RUN ARCHIVE.tar.gz``. Host and user names, home and working folders, serial
numbers, UUIDs, processes and addresses become placeholders in the archive; the folder does not
change. Arrays and pictures are packed unchanged.
"""

from __future__ import annotations

import getpass
import io
import json
import os
import re
import socket
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from calibration.records.store import decode_line, encode_line

BINARY = (".npz", ".png", ".gz")
COMMON = {
    "root",
    "user",
    "ubuntu",
    "admin",
    "localhost",
    "runner",
    "docker",
    "jovyan",
    "nobody",
    "",
}
"""Names that identify nobody."""
LINES = re.compile(
    r"(?m)^(\s*(?:[\w ]*Serial Number|[\w ]*UUID|PDI|Process ID|Name|Board ID|Module Id|Bus"
    r" Id|Minor Number)\s*:).*$"
)
"""Lines of ``nvidia-smi -q`` that identify a machine or what runs on it."""
PATTERNS = (
    (LINES, r"\1 removed"),
    (re.compile(r"\b(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), r"\1-removed"),
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1"),  # users and passwords
    (re.compile(r"(\w+://)\d{1,3}(?:\.\d{1,3}){3}"), r"\1address"),
)


def private_names() -> list[tuple[str, str]]:
    """Return names of this machine that must not leave it, the longest first, and what replaces
    them."""
    host, folders = socket.gethostname(), {str(Path.home()): "~", str(Path.cwd()): "."}
    folders[str(Path(__file__).resolve().parents[2])] = "checkout"
    if sys.prefix != sys.base_prefix:  # an environment, often inside a checkout
        folders[sys.prefix] = "environment"
    names = {host: "host", host.split(".")[0]: "host"}
    with suppress(Exception):  # no entry for the user in a container
        names[getpass.getuser()] = "user"
    found = {name: to for name, to in names.items() if name.lower() not in COMMON and len(name) > 2}
    found |= {path: to for path, to in folders.items() if len(path) > 2}
    return sorted(found.items(), key=lambda item: -len(item[0]))


def without_names(text: str, names: Sequence[tuple[str, str]]) -> str:
    """Return a text without names of a machine.

    >>> print(without_names("/home/ada/x on atlas; atlases; GPU UUID : 7", [("/home/ada", "~"), ("atlas", "host")]))
    ~/x on host; atlases; GPU UUID : 7
    """
    for name, to in names:
        text = re.sub(
            rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", lambda _, to=to: to, text
        )
    for pattern, to in PATTERNS:
        text = pattern.sub(to, text)
    return text


def records_without_names(data: bytes, names: Sequence[tuple[str, str]]) -> bytes:
    """Return the lines of records without names of a machine, with new checksums where a line
    changes."""
    lines = []
    for line in data.splitlines(keepends=True):
        fields = decode_line(line)
        changed = without_names(text := json.dumps(fields), names)
        lines.append(
            line if fields is None or changed == text else encode_line(json.loads(changed))
        )
    return b"".join(lines)


def pack(folder: Path, archive: Path, names: Sequence[tuple[str, str]]) -> int:
    """Write the archive and return the number of its files."""
    partial = archive.with_name(archive.name + ".part")
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    with tarfile.open(partial, "w:gz") as tar:
        for path in files:
            data = path.read_bytes()
            if path.suffix == ".jsonl":
                data = records_without_names(data, names)
            elif path.suffix not in BINARY:
                data = without_names(data.decode("utf-8", "replace"), names).encode()
            # no owner
            entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mtime, entry.mode = len(data), int(path.stat().st_mtime), 0o644
            tar.addfile(entry, io.BytesIO(data))
    os.replace(partial, archive)
    return len(files)


if __name__ == "__main__":
    print(f"{sys.argv[2]}: {pack(Path(sys.argv[1]), Path(sys.argv[2]), private_names())} files")
