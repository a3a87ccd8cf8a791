"""Where an engine publishes its KV events and its load, and lends KV."""

import argparse
import os
import socket

from common.arguments import port_number
from common.errors import ComponentError
from common.server_addresses import server_addresses


def add_kv_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where; see `kv_publisher.publishing`."""
    env = os.environ.get
    parser.add_argument(
        "--kv-host",
        metavar="ADDRESS",
        default=env("KV_HOST"),
        help="publish KV events and metrics, and lend KV, on this address of this machine (env "
        "KV_HOST; default: the one that reaches NATS)",
    )
    for name, first in (("kv-events", 5557), ("metrics", 5657)):
        variable = f"{name.upper().replace('-', '_')}_PORT"
        parser.add_argument(
            f"--{name}-port",
            type=port_number,
            metavar="N",
            default=env(variable),
            help=f"0 takes a free one (env {variable}; default: {first} + worker id, or a free "
            "one if that is taken)",
        )


def kv_host() -> str:
    """The address of this machine that others reach it at, as far as NATS is a guide."""
    host, port = next(iter(server_addresses("NATS_SERVER").values()))
    address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(address[0], address[1]) as probe:
        probe.connect(address[4])  # sends nothing: a datagram socket only picks its route
        own: str = probe.getsockname()[0]
    return own


def zmq_host(host: str, purpose: str) -> str:
    """The address as it stands in a ZMQ endpoint; `purpose` is what could not be done there.

    Raises:
        ComponentError: it is none that others could connect to.
    """
    if host in ("0.0.0.0", "::", "*"):  # noqa: S104 (refused)
        raise ComponentError(f"cannot {purpose} on {host}: name one address, which others reach")
    return f"[{host}]" if ":" in host else host
