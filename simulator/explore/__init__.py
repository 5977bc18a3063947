"""The page and the report: predictions to look at, in a browser on this machine or as one HTML file.

Nothing is predicted here. :mod:`~simulator.explore.state` holds what is asked for and its form as a URL query,
:mod:`~simulator.explore.predictions` calls the simulator, :mod:`~simulator.explore.charts` turns predictions into
Plotly figures, :mod:`~simulator.explore.markup` into HTML. :mod:`~simulator.explore.app` serves them with Dash,
:mod:`~simulator.explore.report` writes them as one file; both need the optional extra ``explore``.
"""
