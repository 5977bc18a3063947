"""Check a source archive and the wheels made of it: ``python .ci/dists.py SDIST WHEEL
WHEEL_OF_THE_TREE``.

Run in the tree that they were built from. The archive must hold every file of the tree; the wheel
must hold every file of the packages except evidence, and nothing else; the wheel built from the
archive must equal the one built from the tree; and both must stay small.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

PACKAGES = ("simulator", "calibration", "hardware_profiles")
NOT_INSTALLED = "calibration/evidence/"
MADE = ("build/", "dist/", "prunesim.egg-info/")
MOST_BYTES = {"tree": 20_000_000, "wheel": 6_000_000}
LICENSES = (
    "LICENSE",
    "calibration/measurements/NOTICE",
    "calibration/measurements/LICENSE-Apache-2.0.txt",
)


def tree_files(root: Path) -> set[str]:
    """Files of a tree, without what building and running left there."""
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(MADE) and "__pycache__" not in name}


def archive_files(path: Path) -> set[str]:
    """Files of a source archive, without its top folder and what building adds."""
    with tarfile.open(path) as archive:
        names = {
            str(PurePosixPath(*PurePosixPath(m.name).parts[1:]))
            for m in archive.getmembers()
            if m.isfile()
        }
    return {name for name in names if not name.startswith(MADE)} - {"PKG-INFO"}


def wheel_sums(path: Path) -> dict[str, int]:
    """Files of a wheel and their checksums."""
    with zipfile.ZipFile(path) as wheel:
        return {entry.filename: entry.CRC for entry in wheel.infolist()}


def faults(tree: Path, sdist: Path, wheel: Path, wheel_of_tree: Path) -> list[str]:
    """What is wrong with them, a line each."""
    found = []
    files, archived, sums = tree_files(tree), archive_files(sdist), wheel_sums(wheel)
    info = f"prunesim-{wheel.name.split('-')[1]}.dist-info/"
    found += [f"{sdist.name}: lacks {name}" for name in sorted(files - archived)]
    found += [
        f"{sdist.name}: holds {name}, which the tree does not" for name in sorted(archived - files)
    ]
    packaged = {
        name
        for name in files
        if name.split("/")[0] in PACKAGES and not name.startswith(NOT_INSTALLED)
    }
    shipped = {name for name in sums if not name.startswith(info)}
    found += [f"{wheel.name}: lacks {name}" for name in sorted(packaged - shipped)]
    found += [
        f"{wheel.name}: holds {name}, which is no part of a package"
        for name in sorted(shipped - packaged)
    ]
    found += [
        f"{wheel.name}: lacks the licence {name}"
        for name in LICENSES
        if f"{info}licenses/{name}" not in sums
    ]
    sizes = {
        "tree": sum((tree / name).stat().st_size for name in files),
        "wheel": wheel.stat().st_size,
    }
    found += [
        f"{n}: {size / 1e6:.1f} MB, above {MOST_BYTES[n] / 1e6:g}"
        for n, size in sizes.items()
        if size > MOST_BYTES[n]
    ]
    other = wheel_sums(wheel_of_tree)
    found += [
        f"{name}: differs between the wheel of the archive and that of the tree"
        for name in sorted({n for n, _ in sums.items() ^ other.items()})
    ]
    with zipfile.ZipFile(wheel) as opened:
        version = HeaderParser().parsestr(opened.read(f"{info}METADATA").decode("utf-8"))["Version"]
    if not (
        sdist.name == f"prunesim-{version}.tar.gz"
        and wheel.name == wheel_of_tree.name == f"prunesim-{version}-py3-none-any.whl"
    ):
        found.append(
            f"{sdist.name}, {wheel.name}, {wheel_of_tree.name}: expected names with version"
            f" {version}"
        )
    return found


if __name__ == "__main__":
    wrong = faults(Path(), *(Path(name) for name in sys.argv[1:4]))
    print("\n".join(wrong) or "the archive and the wheel hold what they should")
    sys.exit(1 if wrong else 0)
