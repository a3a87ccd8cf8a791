"""NATS and etcd, as the environment names them."""

import asyncio
import os
from urllib.parse import urlsplit

from common.errors import ComponentError
from common.telemetry import log

RETRY_S = 0.5


async def wait_for_servers() -> None:
    """Return once NATS and etcd accept connections; the runtime itself would block on them.

    Raises:
        ComponentError: an address is not one.
    """
    for variable, example in (
        ("NATS_SERVER", "nats://127.0.0.1:4222"),
        ("ETCD_ENDPOINTS", "http://127.0.0.1:2379"),
    ):
        url = os.environ[variable].split(",")[0]
        host, port = _host_and_port(variable, url, example)
        waited = False
        while True:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError as error:
                if not waited:
                    log.warning("waiting for %s: %s", url, error)
                waited = True
                await asyncio.sleep(RETRY_S)
            else:
                writer.close()
                break


def _host_and_port(variable: str, url: str, example: str) -> tuple[str, int]:
    address = urlsplit(url)
    try:
        if address.scheme and address.hostname and address.port:
            return address.hostname, address.port
    except ValueError:  # a port that is no number
        pass
    raise ComponentError(f"{variable}={url} is not like {example}")
