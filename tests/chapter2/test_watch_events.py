"""`scripts/watch_events`: what it prints of what it is sent, and how it ends."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager

from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, KvEventBatch
from launch.ports import free_port
from tests.chapter1.helpers import chat, http_client
from tests.conftest import StartPipeline

import msgspec
import pytest
import zmq
import zmq.asyncio

COMMAND = (sys.executable, "-m", "chapter2.watch_events")


@asynccontextmanager
async def watching(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, env={**os.environ, **(environment or {})}, stdout=PIPE, stderr=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 20)).decode().rstrip("\n")


@pytest.fixture
def publisher() -> Iterator[zmq.asyncio.Socket]:
    """An XPUB socket: it hears when a subscriber has come."""
    with zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.linger = 0
        socket.bind("tcp://127.0.0.1:*")
        yield socket


def address(socket: zmq.asyncio.Socket) -> str:
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")


async def send(socket: zmq.asyncio.Socket, seq: int, events: list[KvEvent]) -> None:
    payload = msgspec.msgpack.encode(KvEventBatch(0.0, events))
    await socket.send_multipart([b"kv@1", seq.to_bytes(8, "big"), payload])


@pytest.mark.parametrize("heartbeats", [False, True])
async def test_events_are_printed_as_they_come(
    publisher: zmq.asyncio.Socket, heartbeats: bool
) -> None:
    """One line an event; Ctrl-C is the normal end: status 0, no traceback."""
    flags = ["--heartbeats"] if heartbeats else []
    async with watching(address(publisher), *flags) as process:
        assert await line(process) == f"watching {address(publisher)}"
        assert await asyncio.wait_for(publisher.recv(), 20) == b"\x01"
        await send(publisher, 7, [])
        stored = BlockStored([-1, 0xABCDEF << 40], None, [1, 2, 3, 4], 2)
        long = BlockStored([0xABCDEF << 40], -1, list(range(16)), 16)
        await send(publisher, 8, [stored, long, BlockRemoved([-1])])
        await send(publisher, 9, [AllBlocksCleared()])
        if heartbeats:
            assert await line(process) == "kv@1 #7 heartbeat"
        assert (
            await line(process) == "kv@1 #8 BlockStored ffffff abcdef after nothing, tokens 1 2 3 4"
        )
        assert await line(process) == (
            "kv@1 #8 BlockStored abcdef after ffffff, tokens 0 1 2 3 4 … 16 in all"
        )
        assert await line(process) == "kv@1 #8 BlockRemoved ffffff"
        assert await line(process) == "kv@1 #9 AllBlocksCleared"
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.communicate(), 20) == (b"", b"")
        assert process.returncode == 0


async def test_what_is_not_a_batch_of_events_is_said(publisher: zmq.asyncio.Socket) -> None:
    """An engine's other port carries its load."""
    async with watching(address(publisher)) as process:
        await asyncio.wait_for(publisher.recv(), 20)
        payload = msgspec.msgpack.encode([0.0, {"running": 0}, None])
        await publisher.send_multipart([b"kv@1", bytes(8), payload])
        _, errors = await asyncio.wait_for(process.communicate(), 20)
        assert errors.startswith(b"error: what came is no batch of KV events: Expected `array`")
        assert process.returncode == 1


@pytest.mark.parametrize("count", [1, 2])
async def test_frames_that_are_not_three_are_said(
    publisher: zmq.asyncio.Socket, count: int
) -> None:
    async with watching(address(publisher)) as process:
        await asyncio.wait_for(publisher.recv(), 20)
        await publisher.send_multipart([b"x"] * count)
        _, errors = await asyncio.wait_for(process.communicate(), 20)
        assert errors.startswith(b"error: what came is no batch of KV events: ")
        assert process.returncode == 1


async def ended(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """What the script writes to stderr, and its status."""
    async with watching(*arguments, environment=environment) as process:
        _, errors = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode is not None
        return errors.decode(), process.returncode


async def test_an_address_that_is_none() -> None:
    errors, status = await ended("127.0.0.1:5557")
    assert "'127.0.0.1:5557'); an address is like tcp://127.0.0.1:5557\n" in errors
    assert errors.startswith("error: ")
    assert status == 1


async def test_no_servers() -> None:
    addresses = {
        "NATS_SERVER": f"nats://127.0.0.1:{free_port()}",
        "ETCD_ENDPOINTS": f"http://127.0.0.1:{free_port()}",
    }
    errors, status = await ended(environment=addresses)
    assert f"error: no answer from NATS at {addresses['NATS_SERVER']} and etcd at" in errors
    assert status == 1


async def test_no_engine(servers: dict[str, str], namespace: str) -> None:
    errors, status = await ended("--namespace", namespace, environment=servers)
    expected = (
        f"error: no engine with the endpoint engine.kv_source is up in the namespace {namespace}"
    )
    assert expected in errors
    assert status == 1


async def test_the_engines_of_a_pipeline_are_found(
    start_pipeline: StartPipeline, servers: dict[str, str]
) -> None:
    async with start_pipeline(chapter="chapter2", engines=2) as p:
        arguments = ["--namespace", p.namespace, "--heartbeats"]
        async with watching(*arguments, environment=servers) as process:
            heard = set[str]()
            while heard != {"worker 0", "worker 1"}:  # then both subscriptions have arrived
                words = (await line(process)).split()
                if words[-1] == "heartbeat":
                    heard.add(" ".join(words[:2]))
            async with http_client(p.url) as client:
                body = chat("Tell me a long story, please. " * 5, max_tokens=4)
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            while "heartbeat" in (event := await line(process)):
                pass
            assert " BlockStored " in event
            assert " after nothing, tokens 1 " in event
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.communicate(), 20)
            assert process.returncode == 0
