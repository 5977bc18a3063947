"""Show predictions: a page in the browser (:mod:`~simulator.explore.app`, extra ``explore``) or one
HTML file.

:mod:`~simulator.explore.content` predicts what the page and the report show, from the arguments of
:func:`simulator.table`.
"""
