"""The command-line arguments of a component that serves HTTP."""

import argparse
import os

from common.arguments import port_number, positive_int, positive_seconds


def add_http_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where to listen and how much to take."""
    env = os.environ.get
    parser.add_argument("--host", default=env("HOST", "127.0.0.1"), help="(env HOST, %(default)s)")
    parser.add_argument(
        "--port", type=port_number, default=env("PORT", "8000"), help="(env PORT, %(default)s)"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        default=env("ALLOWED_HOSTS", "").replace(",", " ").split(),
        help="a name by which clients reach the server, beside localhost, IP addresses and --host; "
        "may repeat; with none, a server on all addresses takes any (env ALLOWED_HOSTS, with "
        "commas between them)",
    )
    parser.add_argument(
        "--max-in-flight",
        type=positive_int,
        default=env("MAX_IN_FLIGHT", "1024"),
        help="requests at once; more get a 429 (env MAX_IN_FLIGHT, %(default)s)",
    )
    parser.add_argument(
        "--max-body-bytes",
        type=positive_int,
        default=env("MAX_BODY_BYTES", str(512 * 1024)),
        help="a longer request gets a 413; NATS carries at most 1 MiB unless configured "
        "otherwise (env MAX_BODY_BYTES, %(default)s)",
    )
    parser.add_argument(
        "--body-timeout",
        type=positive_seconds,
        metavar="SECONDS",
        default=env("BODY_TIMEOUT", "30"),
        help="a body that takes longer to come gets a 408 (env BODY_TIMEOUT, %(default)s)",
    )
