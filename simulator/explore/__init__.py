"""Explore predictions: a page served to a browser on this machine, or a report in one HTML file.

:mod:`~simulator.explore.state` holds the settings and their form as a URL query. :mod:`~simulator.explore.predictions`
calls the simulator. :mod:`~simulator.explore.charts` makes Plotly figures of predictions,
:mod:`~simulator.explore.markup` HTML. :mod:`~simulator.explore.app` serves them with Dash,
:mod:`~simulator.explore.report` writes them to one file; both need the optional extra ``explore``.
"""
