"""Execute every notebook of this folder from top to bottom, and refuse one that was committed with outputs.

Usage: ``python notebooks/run.py [NAME.ipynb ...]``. Nothing is written: outputs stay out of the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(names: list[str]) -> int:
    folder = Path(__file__).resolve().parent
    for path in [Path(n) for n in names] or sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells):
            print(f"{path.name}: has outputs; strip them before committing")
            return 1
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
        print(f"{path.name}: ran {len(notebook.cells)} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
