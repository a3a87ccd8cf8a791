"""TCP ports on this machine."""

import itertools
import random
import socket

from launch.errors import LaunchError

LOOPBACK = "127.0.0.1"
# Below those that Linux gives to connections and to whoever asks for any port, and each one
# once: a port must still be free when it is used, a good while after it was found to be.
_PORTS = itertools.cycle(random.sample(range(15000, 32768), 17768))


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


def free_port() -> int:
    """A port that was free a moment ago; another program may take it before it is used."""
    return next(port for port in _PORTS if is_free(port))


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
