"""NATS and etcd of one run, and the check of those that the environment names."""

import asyncio
import socket
from collections.abc import Iterator

from launch.child import ChildFailedError
from launch.children import Children
from launch.errors import LaunchError
from launch.ports import LOOPBACK, free_port, free_port_near, http_port, is_free
from launch.servers import check_etcd, check_nats, etcd_server, nats_server
from tests.chapter1.helpers import http_client

import pytest


@pytest.fixture
def foreign_port() -> Iterator[int]:
    """A port where something listens that is neither NATS nor etcd nor ours."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]


def nats_greeting(url: str) -> str:
    with socket.create_connection((LOOPBACK, int(url.rpartition(":")[2])), timeout=5) as nats:
        return nats.makefile().readline()


async def test_nats_has_jetstream_and_is_gone_afterwards(children: Children) -> None:
    async with nats_server(children) as nats:
        check_nats(nats.url)
        assert '"jetstream":true' in nats_greeting(nats.url)
    assert is_free(int(nats.url.rpartition(":")[2]))


async def test_etcd_answers_and_is_gone_afterwards(children: Children) -> None:
    async with etcd_server(children) as etcd:
        check_etcd(etcd.url)
    assert is_free(int(etcd.url.rpartition(":")[2]))


async def test_etcd_keeps_its_data_and_its_port_when_it_restarts(children: Children) -> None:
    """The failure tests restart the servers under a running pipeline."""
    async with etcd_server(children) as etcd, http_client(etcd.url) as client:
        pair = {"key": "a2V5", "value": "dmFsdWU="}
        (await client.post("/v3/kv/put", json=pair)).raise_for_status()
        await etcd.child.restart()
        answer = await client.post("/v3/kv/range", json={"key": pair["key"]})
        assert answer.json()["kvs"][0]["value"] == pair["value"]


async def test_nats_restarts_on_its_port(children: Children) -> None:
    async with nats_server(children) as nats:
        nats.child.kill()
        await nats.child.wait()
        nats.child.start_again()
        await nats.child.wait_ready()
        check_nats(nats.url)


async def test_a_port_that_was_asked_for_and_is_taken(
    children: Children, foreign_port: int
) -> None:
    with pytest.raises(ChildFailedError, match="address already in use"):
        async with nats_server(children, foreign_port):
            pass
    with pytest.raises(ChildFailedError, match="address already in use"):
        async with etcd_server(children, foreign_port):
            pass


async def test_a_free_port_that_is_lost_to_a_race_is_replaced(
    children: Children, foreign_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [foreign_port, free_port()]
    monkeypatch.setattr("launch.servers.free_port", lambda: ports.pop(0))
    async with nats_server(children) as nats:
        check_nats(nats.url)
    assert not ports


@pytest.mark.parametrize("check", [check_nats, check_etcd])
def test_nothing_at_the_address_names_the_variable(check: object) -> None:
    variable = "NATS_SERVER" if check is check_nats else "ETCD_ENDPOINTS"
    url = f"{'nats' if check is check_nats else 'http'}://{LOOPBACK}:{free_port()}"
    assert callable(check)
    with pytest.raises(LaunchError, match=rf"{variable}={url}: .*unset {variable}"):
        check(url)


async def test_something_else_at_the_address(children: Children) -> None:
    async with nats_server(children) as nats, etcd_server(children) as etcd:
        with pytest.raises(LaunchError, match="NATS_SERVER="):
            # etcd says nothing before it is asked; the check must not wait for ever.
            await asyncio.to_thread(check_nats, etcd.url)
        with pytest.raises(LaunchError, match="ETCD_ENDPOINTS="):
            await asyncio.to_thread(check_etcd, nats.url.replace("nats:", "http:"))


async def test_one_etcd_endpoint_of_several_is_enough(children: Children) -> None:
    async with etcd_server(children) as etcd:
        check_etcd(f"http://{LOOPBACK}:{free_port()},{etcd.url}")


def test_a_default_port_gives_way_and_an_explicit_one_does_not(foreign_port: int) -> None:
    free = free_port()
    assert http_port(None, free) == free
    assert http_port(free, foreign_port) == free
    assert free_port_near(foreign_port) != foreign_port
    with pytest.raises(LaunchError, match=f"--port {foreign_port}: another program"):
        http_port(foreign_port, free)
