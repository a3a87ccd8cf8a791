"""TCP ports on this machine."""

import itertools
import os
import random
import socket
from collections.abc import Iterator
from functools import cache

from launch.errors import LaunchError

LOOPBACK = "127.0.0.1"
# Below those that Linux gives to connections and to whoever asks for any port.
FREE_PORTS = range(15000, 32768)


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of the loopback address right now."""
    with socket.socket() as listener:
        # Servers set it too: a port with old connections in TIME_WAIT is free, one with a
        # listener is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


@cache
def _ports() -> Iterator[int]:
    """Each one once: a port must still be free when it is used, a good while after it was found.

    FREE_PORTS=FIRST-LAST in the environment keeps programs apart that run side by side, and the
    processes that they start.
    """
    given = os.environ.get("FREE_PORTS", f"{FREE_PORTS.start}-{FREE_PORTS.stop - 1}")
    first, _, last = given.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) < 65536):
        raise LaunchError(f"FREE_PORTS={given}: not FIRST-LAST, such as 15000-15999")
    ports = range(int(first), int(last) + 1)
    return itertools.cycle(random.sample(ports, len(ports)))


def free_port() -> int:
    """A port that was free a moment ago; another program may take it before it is used.

    Raises:
        LaunchError: none is free, or FREE_PORTS in the environment is not a range of ports.
    """
    for port in itertools.islice(_ports(), len(FREE_PORTS)):
        if is_free(port):
            return port
    raise LaunchError("no port is free for a server; FREE_PORTS=FIRST-LAST names other ones")


def free_port_near(default: int) -> int:
    """`default` if it is free, otherwise some free port."""
    return default if is_free(default) else free_port()


def http_port(asked: int | None, default: int) -> int:
    """The port to serve HTTP on: `asked` must be free, `default` gives way to a free one.

    Raises:
        LaunchError: `asked` cannot be listened on.
    """
    if asked is None:
        return free_port_near(default)
    if not is_free(asked):
        raise LaunchError(
            f"--port {asked}: another program listens there, or it needs more rights; "
            "choose another port, or leave --port out to get a free one"
        )
    return asked
