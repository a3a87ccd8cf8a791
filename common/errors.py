"""How a component says that it cannot go on."""


class ComponentError(Exception):
    """The process exits with status 1 and this message."""
