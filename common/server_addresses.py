"""NATS and etcd, as the environment names them (`common` has completed the addresses)."""

import asyncio
import os
from urllib.parse import urlsplit

from common import RUNTIME_DEFAULTS
from common.errors import ComponentError
from common.telemetry import log

RETRY_S = 0.5
CONNECT_TIMEOUT_S = 3.0
SCHEMES = {"NATS_SERVER": ("nats", "tls"), "ETCD_ENDPOINTS": ("http", "https")}


async def wait_for_servers() -> None:
    """Return once NATS and one etcd endpoint accept connections; the runtime would block or fail.

    Raises:
        ComponentError: an address is not one.
    """
    nats, etcd = server_addresses("NATS_SERVER"), server_addresses("ETCD_ENDPOINTS")
    await _wait_for_some(nats)
    # The runtime spreads its calls over all endpoints, and fails those to one that is down.
    os.environ["ETCD_ENDPOINTS"] = ",".join(await _wait_for_some(etcd))


def server_addresses(variable: str) -> dict[str, tuple[str, int]]:
    """Host and port by URL, from NATS_SERVER (the runtime takes one) or ETCD_ENDPOINTS.

    Raises:
        ComponentError: an address is not one.
    """
    value = os.environ[variable]
    urls = [value] if variable == "NATS_SERVER" else value.split(",")
    return {url: _host_and_port(variable, url) for url in urls}


async def _wait_for_some(addresses: dict[str, tuple[str, int]]) -> list[str]:
    """The URLs that accept connections, once there are any."""
    told = False
    while True:
        listening = []
        for url, (host, port) in addresses.items():
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    _, writer = await asyncio.open_connection(host, port)
            except OSError as error:
                if not told:
                    log.warning("waiting for %s: %s", url, str(error) or "no answer")
            else:
                writer.close()
                listening.append(url)
        if listening:
            return listening
        told = True
        await asyncio.sleep(RETRY_S)


def _host_and_port(variable: str, url: str) -> tuple[str, int]:
    try:
        address = urlsplit(url)
        if address.scheme in SCHEMES[variable] and address.hostname and address.port:
            return address.hostname, address.port
    except ValueError:  # a port that is no number, half an IPv6 address
        pass
    raise ComponentError(f"{variable}={url} is not like {RUNTIME_DEFAULTS[variable]}")
