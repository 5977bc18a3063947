"""The whole command line, ``prunesim``: :mod:`calibration.cli.program`, which is imported late so that the program
answers a signal from its start on."""


def main() -> None:
    """Entry point of the ``prunesim`` command."""
    from simulator.start import start

    start("calibration.cli.program")


def __getattr__(name: str) -> object:
    if name not in ("app", "run"):
        raise AttributeError(f"module 'calibration.cli' has no attribute {name!r}")
    from calibration.cli import program

    value: object = getattr(program, name)
    return value
