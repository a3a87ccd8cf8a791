"""Errors that the person at the terminal can act on."""


class LaunchError(Exception):
    """What went wrong and what to do; printed without a traceback."""
