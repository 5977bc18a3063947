"""Requests in a server: arrivals, the engine's schedule of steps, and the times of requests.

``arrivals.py`` draws or reads requests, ``server.py`` has the settings of a server, ``steps.py``
tabulates the times of its steps, ``schedule.py`` simulates the schedule, and ``served.py`` has the
times of requests. ``steady.py`` has memory, and the law of clients at a fixed concurrency.
"""
