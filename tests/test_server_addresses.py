"""The addresses of NATS and etcd: the forms that people write, and servers that are down."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from common import complete_address
from common.errors import ComponentError
from common.server_addresses import server_addresses, wait_for_servers
from launch.ports import LOOPBACK, free_port
from launch.servers import server_environment
from tests.conftest import StartPipeline

import pytest

NATS = "nats://127.0.0.1:4222"
ETCD = "http://127.0.0.1:2379"


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of a listening socket."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield f"{LOOPBACK}:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "default", "complete"),
    [
        ("localhost:4223", NATS, "nats://localhost:4223"),
        ("nats://host", NATS, "nats://host:4222"),
        ("nats://user:word@host", NATS, "nats://user:word@host:4222"),
        ("host", ETCD, "http://host:2379"),
        (" https://host/ ", ETCD, "https://host:2379"),
        ("[::1]", ETCD, "http://[::1]:2379"),
        ("host:", ETCD, "http://host:2379"),
        ("host:many", NATS, "host:many"),
        ("[::1", NATS, "[::1"),
    ],
)
def test_the_scheme_and_the_port_may_be_left_out(address: str, default: str, complete: str) -> None:
    assert complete_address(address, default) == complete


@pytest.mark.parametrize(
    ("nats", "etcd", "seen"),
    [
        ("a", "b, c:1", "nats://a:4222 http://b:2379,http://c:1 None"),
        ("localhost:1", "", "nats://localhost:1 http://127.0.0.1:2379 127.0.0.1"),
        ("", "b", "nats://127.0.0.1:4222 http://b:2379 127.0.0.1"),
    ],
)
def test_the_runtime_reads_complete_addresses(nats: str, etcd: str, seen: str) -> None:
    """It reads the environment itself, when it is imported and later."""
    names = ("NATS_SERVER", "ETCD_ENDPOINTS", "DYN_TCP_RPC_HOST")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment.update(NATS_SERVER=nats, ETCD_ENDPOINTS=etcd)
    environment.pop("DYN_TCP_RESPONSE_STREAM_HOST", None)
    code = f"import common, os; print(*(os.environ.get(name) for name in {names}))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True
    ).stdout
    assert printed.strip() == seen


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NATS_SERVER", "nats://a:4222,nats://b:4222"),
        ("NATS_SERVER", "http://a:4222"),
        ("NATS_SERVER", "nats://a:port"),
        ("ETCD_ENDPOINTS", "http://a:2379,nats://b:2379"),
        ("ETCD_ENDPOINTS", "http://a:2379,"),
    ],
)
def test_what_is_no_address_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ComponentError, match=rf"^{variable}=.* is not like \w+://127"):
        server_addresses(variable)


@pytest.mark.parametrize("dead_first", [True, False])
async def test_only_the_etcd_endpoints_that_answer_are_used(
    monkeypatch: pytest.MonkeyPatch, listener: str, dead_first: bool
) -> None:
    urls = [f"http://{LOOPBACK}:{free_port()}", f"http://{listener}"]
    monkeypatch.setenv("NATS_SERVER", f"nats://{listener}")
    monkeypatch.setenv("ETCD_ENDPOINTS", ",".join(urls if dead_first else reversed(urls)))
    await asyncio.wait_for(wait_for_servers(), 30)
    assert os.environ["ETCD_ENDPOINTS"] == f"http://{listener}"


async def test_a_component_takes_short_addresses_and_a_dead_endpoint(
    start_pipeline: StartPipeline, servers: dict[str, str]
) -> None:
    """The runtime by itself fails every call that it sends to an endpoint that is down."""
    environment = server_environment(
        servers["NATS_SERVER"].removeprefix("nats://"),
        f"{LOOPBACK}:{free_port()},{servers['ETCD_ENDPOINTS'].removeprefix('http://')}",
    )
    async with start_pipeline(start=["engine0"], environment=environment) as running:
        assert running.ready
