"""Give the names that people use: "A100 80GB SXM", "Transformers (eager)", "Llama-3.1-8B".

Figures are labelled with these titles; tables and files have identifiers. Titles of pruning families are those of
:data:`simulator.figures.style.STYLES`. An identifier without a title, such as the name of a profile of the user, is its
own title.
"""

from __future__ import annotations

import re
from functools import lru_cache

from simulator.engines.engine import list_engines, load_engine
from simulator.engines.generations import split
from simulator.hardware.library import list_hardware, load_hardware
from simulator.models.library import model_title as model_title

_LABEL = re.compile(r"(?P<name>[^@ ]+)(?:@(?P<stack>\S+))?(?P<more>.*)")
_SXM = re.compile(r"(SXM)\d")


@lru_cache(maxsize=256)
def device_title(label: str) -> str:
    """Return the title of a device from the label of its profile: the words of the vendor's title that tell it from
    others, which are those of its name, and a software stack that was selected by name.
    """
    found = _LABEL.fullmatch(label)
    if found is None or found["name"] not in list_hardware():
        return label
    words = [_SXM.sub(r"\1", word) for word in load_hardware(found["name"]).title.split()]
    named = [word for word in words if word.lower() in found["name"].split("_")]
    stack = f" ({engine_title(found['stack'])} kernels)" if found["stack"] else ""
    return f"{' '.join(named or words)}{stack}{found['more']}"


def engine_title(name: str) -> str:
    """Return the title of an engine from its name."""
    return load_engine(name).short_title or name if split(name)[0] in list_engines() else name
