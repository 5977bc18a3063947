"""The pages that lie beside docs/ join the site: MkDocs reads one folder, and GitHub shows the
README of the root.

``mkdocs.yml`` names this file as its hook. Links keep the form that GitHub follows; here they are
turned to the place that a page has in the site. What the site does not hold (code, notebooks) is
shown as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "README.md": "index.md",
    "docs/README.md": "structure.md",
    "CONTRIBUTING.md": "how.md",
    "CHANGELOG.md": "changes.md",
}
"""File of the repository -> its place in the site, where that is not its place below docs/."""


def on_files(files: Files, config: Any) -> Files:
    files.remove(files.src_uris["README.md"])  # the index of docs/ would be the site's first page
    for name, place in PLACES.items():
        files.append(
            File.generated(config, place, content=(ROOT / name).read_text(encoding="utf-8"))
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    place = page.file.src_uri
    source = {new: old for old, new in PLACES.items()}.get(place, f"docs/{place}")

    def turned(found: re.Match[str]) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = PLACES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if path not in files.src_uris:
            return found[0] if image else text
        return (
            f"{image}[{text}]({posixpath.relpath(path, posixpath.dirname(place) or '.')}{anchor})"
        )

    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", turned, markdown)
