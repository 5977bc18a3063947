"""The page and the report: predictions to look at, in a browser on this machine or as one HTML file.

Nothing is predicted here. :mod:`~simulator.explore.state` holds what is asked for and its form as a URL query,
:mod:`~simulator.explore.answer` asks the simulator, :mod:`~simulator.explore.charts` turns answers into Plotly figures,
:mod:`~simulator.explore.markup` into HTML. :mod:`~simulator.explore.app` serves them with Dash,
:mod:`~simulator.explore.report` writes them as one file; both need the optional extra ``explore``.
"""

from __future__ import annotations

from simulator.errors import InputError


def needs_extra(what: str) -> InputError:
    """The error where the optional extra is not installed.

    >>> print(needs_extra("the page"))
    the page needs the extra "explore": pip install "prunesim[explore]" (in a checkout: pip install -e ".[explore]")
    """
    install = 'pip install "prunesim[explore]" (in a checkout: pip install -e ".[explore]")'
    return InputError(f'{what} needs the extra "explore": {install}')
