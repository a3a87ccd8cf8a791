"""NATS and etcd for one run, from the wheels that carry them."""

import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from launch.child import Child, ChildFailedError
from launch.children import Children
from launch.errors import LaunchError
from launch.ports import LOOPBACK, free_port

import httpx

NATS_PORT = 4222
ETCD_PORT = 2379
CHECK_TIMEOUT = 3.0


@dataclass(frozen=True)
class Server:
    """A server that runs here: its address and its process."""

    url: str
    child: Child


def server_environment(nats_url: str, etcd_url: str) -> dict[str, str]:
    """The environment that makes a component use these servers."""
    return {"NATS_SERVER": nats_url, "ETCD_ENDPOINTS": etcd_url}


@asynccontextmanager
async def nats_server(children: Children, port: int | None = None) -> AsyncIterator[Server]:
    """A NATS server with JetStream, on `port` or a free one, gone at the end of the block."""

    def command(port: int, folder: Path) -> list[str | Path]:
        return [_program("nats-server"), "-a", LOOPBACK, "-p", str(port), "-js", "-sd", folder]

    child, port = await _start(children, "nats", command, port, ready_line="Server is ready")
    try:
        yield Server(f"nats://{LOOPBACK}:{port}", child)
    finally:
        await child.stop()


@asynccontextmanager
async def etcd_server(children: Children, port: int | None = None) -> AsyncIterator[Server]:
    """An etcd of one member, on `port` or a free one, gone at the end of the block."""

    def command(port: int, folder: Path) -> list[str | Path]:
        url = f"http://{LOOPBACK}:{port}"
        return [
            *(_program("etcd"), "--data-dir", folder, "--log-level", "error"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", f"http://{LOOPBACK}:0"),
            # Its data are gone when it ends: no lease should be lost for a slow disk.
            "--unsafe-no-fsync",
            # One member has nobody to wait for: it may elect itself at once.
            *("--heartbeat-interval", "50", "--election-timeout", "500"),
        ]

    child, port = await _start(children, "etcd", command, port)
    try:
        yield Server(f"http://{LOOPBACK}:{port}", child)
    finally:
        await child.stop()


async def _start(
    children: Children,
    name: str,
    command: Callable[[int, Path], list[str | Path]],
    port: int | None,
    ready_line: str | None = None,
) -> tuple[Child, int]:
    """Start a server and wait until it answers; a free port may be lost to a race, so retry."""
    tries_left = 3 if port is None else 1
    while True:
        tries_left -= 1
        chosen = port or free_port()
        arguments = command(chosen, children.new_path(name))
        child = children.start(name, arguments, ready_line=ready_line)
        try:
            await child.wait_ready()
        except ChildFailedError:
            await child.stop()
            if tries_left == 0:
                raise
        except BaseException:
            await child.stop()
            raise
        else:
            return child, chosen


def _program(name: str) -> Path:
    beside_python = Path(sys.executable).with_name(name)
    if beside_python.exists():
        return beside_python
    on_path = shutil.which(name)
    if on_path is None:
        variable = "NATS_SERVER" if name == "nats-server" else "ETCD_ENDPOINTS"
        raise LaunchError(
            f"{name} is neither in {beside_python.parent} nor on the PATH; install it, or set "
            f"{variable} to a server that runs"
        )
    return Path(on_path)


def check_nats(url: str) -> None:
    """Check that the NATS server which NATS_SERVER names answers.

    Raises:
        LaunchError: nothing answers there, or something that is not NATS.
    """
    try:
        greeting = _first_line(url)
        if not greeting.startswith("INFO "):
            raise ValueError("what listens there is not a NATS server")
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"NATS_SERVER={url}: {error}; start that server, or unset NATS_SERVER to get one"
        ) from error


def check_etcd(urls: str) -> None:
    """Check that one of the comma-separated endpoints which ETCD_ENDPOINTS names answers.

    Raises:
        LaunchError: none answers, or what answers is not etcd.
    """
    problems = []
    for url in urls.split(","):
        try:
            answer = httpx.get(
                f"{url}/version",
                timeout=CHECK_TIMEOUT,
                trust_env=False,
                verify=False,  # noqa: S501 - the runtime itself verifies certificates
            )
            if "etcdserver" in answer.text:
                return
            problems.append(f"{url}: what listens there is not etcd")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problems.append(f"{url}: {error}")
    raise LaunchError(
        f"ETCD_ENDPOINTS={urls}: {'; '.join(problems)}; start that server, or unset "
        "ETCD_ENDPOINTS to get one"
    )


def _first_line(url: str) -> str:
    parts = urlsplit(url)
    address = (parts.hostname or LOOPBACK, parts.port or NATS_PORT)
    with (
        socket.create_connection(address, timeout=CHECK_TIMEOUT) as connection,
        connection.makefile() as lines,
    ):
        return lines.readline()
