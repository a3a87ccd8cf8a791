"""SIGTERM and SIGINT: deregister first, finish what is in flight, exit 0; a second one is final."""

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

from launch.children import Children
from launch.ports import free_port
from launch.servers import etcd_server, nats_server, server_environment
from tests.chapter1.helpers import (
    CHAT,
    chat,
    engine_settings,
    eventually,
    http_client,
    lines_about,
    load,
    registered,
    stream,
)
from tests.conftest import StartPipeline

import psutil
import pytest

STEPS_OF_20_MS = ["--log-level=debug", *engine_settings(decode_base_ms=20)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["engine0", "processor", "frontend"])
async def test_a_signal_lets_streams_finish(
    start_pipeline: StartPipeline, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    """Nobody finds the process any more while it finishes what it has begun."""
    held = tmp_path / "held"
    held.touch()
    async with (
        start_pipeline(start=[], wait=False) as running,
        http_client(running.url) as client,
    ):
        command = running.commands["engine0"]
        at = command.index("chapter1.engine")
        command[at : at + 1] = ["tests.chapter1.held_engine", str(held), "--log-level=debug"]
        for component in running.commands:
            running.start(component)
        await running.wait_ready()
        stopped = running.processes[name]
        component = name.rstrip("0")
        assert any(entry.startswith(component) for entry in await registered(running))
        async with stream(client, chat(max_tokens=150)) as streamed:
            await streamed.read_text()
            whole = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=150)))
            engine = running.processes["engine0"]
            await eventually(lambda: len(lines_about(engine, "prompt of")) == 2)
            stopped.stopping = True
            psutil.Process(stopped.pid).send_signal(number)

            async def deregistered() -> bool:
                return not any(entry.startswith(component) for entry in await registered(running))

            await eventually(deregistered)
            assert stopped.running
            assert not whole.done()
            held.unlink()
            await streamed.read_all()
            assert streamed.finish_reason == "length"
            response = await whole
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 150
        assert await stopped.wait(timeout=20) == 0
        assert not lines_about(stopped, "Traceback")


@pytest.mark.parametrize("name", ["engine0", "processor"])
async def test_a_replica_that_leaves_under_load_loses_no_request(
    start_pipeline: StartPipeline, children: Children, name: str
) -> None:
    """A rolling restart: one of two replicas leaves and comes back, again and again."""
    arguments = {"engine": engine_settings(decode_base_ms=20)}
    async with (
        start_pipeline(engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        second = children.start("processor2", running.commands["processor"], running.environment)
        await second.wait_ready()
        async with load(client, clients=8) as work:
            for _ in range(3):
                await work.answers(10)
                running.processes[name].terminate()
                assert await running.processes[name].wait(timeout=30) == 0
                await work.answers(10)
                running.start(name)
                await running.processes[name].wait_ready()
        assert not work.failures
        assert work.answered >= 60
        assert await second.stop() == 0


async def test_a_drain_has_a_limit(start_pipeline: StartPipeline) -> None:
    """An answer that takes longer than the limit is given up, and its client told."""
    arguments = {"engine": [*STEPS_OF_20_MS, "--drain-timeout=1"]}
    async with start_pipeline(arguments=arguments) as running, http_client(running.url) as client:
        async with stream(client, chat(max_tokens=5000)) as answer:
            await answer.read_text()
            began = time.monotonic()
            running.processes["engine0"].terminate()
            await answer.read_all()
        assert answer.error is not None
        assert answer.error["code"] == "unavailable"
        assert 1 <= time.monotonic() - began < 20, "the answer would take 100 s"
        assert await running.processes["engine0"].wait(timeout=20) == 0
        assert lines_about(running.processes["engine0"], "drain took longer than 1 s")


@pytest.mark.parametrize("name", ["engine0", "processor", "frontend"])
async def test_a_second_signal_is_final(start_pipeline: StartPipeline, name: str) -> None:
    arguments = {"engine": STEPS_OF_20_MS}
    async with (
        start_pipeline(arguments=arguments) as running,
        http_client(running.url) as client,
        stream(client, chat(max_tokens=5000)) as answer,
    ):
        await answer.read_text()
        child = running.processes[name]
        child.stopping = True
        process = psutil.Process(child.pid)
        process.send_signal(signal.SIGINT)
        await eventually(lambda: lines_about(child, "draining"))
        process.send_signal(signal.SIGINT)
        assert await child.wait(timeout=20) == 128 + signal.SIGINT


@pytest.mark.parametrize("name", ["engine0", "processor", "frontend"])
async def test_servers_that_come_late(
    start_pipeline: StartPipeline, children: Children, name: str
) -> None:
    """A component waits for NATS and etcd, says so, and leaves when it is told to."""
    nats_port, etcd_port = free_port(), free_port()
    environment = server_environment(
        f"nats://127.0.0.1:{nats_port}", f"http://127.0.0.1:{etcd_port}"
    )
    async with start_pipeline(environment=environment, start=[name], wait=False) as running:
        child = running.processes[name]
        await eventually(lambda: lines_about(child, f"waiting for nats://127.0.0.1:{nats_port}"))
        child.terminate()
        assert await child.wait(timeout=20) == 0
        running.start(name)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(nats_server(children, nats_port))
            await eventually(
                lambda: lines_about(child, f"waiting for http://127.0.0.1:{etcd_port}")
            )
            await stack.enter_async_context(etcd_server(children, etcd_port))
            for other in {"engine0", "processor", "frontend"} - {name}:
                running.start(other)
            await running.wait_ready()
            await running.stop()


async def test_a_signal_while_etcd_is_away(
    start_pipeline: StartPipeline, children: Children
) -> None:
    """What cannot be deregistered is said; the work in flight is finished all the same."""
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(nats_server(children))
        etcd = await stack.enter_async_context(etcd_server(children))
        environment = {**server_environment(nats.url, etcd.url), "ETCD_LEASE_TTL": "30"}
        running = await stack.enter_async_context(
            start_pipeline(environment=environment, arguments={"engine": STEPS_OF_20_MS})
        )
        client = await stack.enter_async_context(http_client(running.url))
        async with stream(client, chat(max_tokens=100)) as answer:
            await answer.read_text()
            etcd.child.kill()
            await etcd.child.wait()
            engine = running.processes["engine0"]
            engine.terminate()
            await answer.read_all()
        assert answer.finish_reason == "length"
        assert await engine.wait(timeout=30) == 0
        assert lines_about(engine, "still listed until its lease expires")
