"""Sessions when NATS restarts, is away, is guarded, or cannot store; and when an agent dies."""

import asyncio
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from chapter4 import kv_bucket
from chapter4.notes import open_notes
from chapter4.session_settings import SessionSettings
from chapter4.sessions import open_sessions
from chapter4.tools import ToolContext, ToolError
from common.errors import ComponentError
from common.protocol import PipelineError
from launch.child import Child
from launch.children import Children
from launch.ports import LOOPBACK, free_port
from launch.servers import Server, nats_server
from tests.chapter4.session_helpers import ENDED, refused, request, said, turn, until

import pytest
import pytest_asyncio

HOLDER = """
import asyncio, sys
from chapter4.session_settings import SessionSettings
from chapter4.sessions import open_sessions
from tests.chapter4.session_helpers import request

async def hold():
    async with open_sessions(sys.argv[1], SessionSettings(lease_s=3.0)) as sessions:
        async with await sessions.begin(request(conversation="c")):
            print("claimed", flush=True)
            await asyncio.Event().wait()

asyncio.run(hold())
"""


@pytest_asyncio.fixture
async def nats(children: Children, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """A NATS of the test's own."""
    async with nats_server(children) as server:
        monkeypatch.setenv("NATS_SERVER", server.url)
        yield server


@asynccontextmanager
async def bare_nats(children: Children, *arguments: str) -> AsyncIterator[Server]:
    """A NATS with these arguments."""
    program, port = Path(sys.executable).with_name("nats-server"), free_port()
    command: list[str | Path] = [program, "-a", LOOPBACK, "-p", str(port), *arguments]
    child = children.start("nats", command, ready_line="Server is ready")
    try:
        await child.wait_ready()
        yield Server(f"nats://{LOOPBACK}:{port}", child)
    finally:
        await child.stop()


async def kill(child: Child) -> None:
    child.kill()
    await child.wait()


async def start_again(child: Child) -> None:
    child.start_again()
    await child.wait_ready()


async def test_a_restart_of_nats_loses_no_turn(nats: Server, namespace: str) -> None:
    async with open_sessions(namespace) as sessions:
        last = await turn(sessions, "a", conversation="c")
        await kill(nats.child)
        await start_again(nats.child)

        async def is_back() -> bool:
            return await said(sessions, conversation="c") == ["a", "re: a"]

        await until(is_back, but="unavailable")
        await turn(sessions, "b", previous_response_id=last)
    async with open_sessions(namespace) as sessions:
        assert await said(sessions, conversation="c") == ["a", "re: a", "b", "re: b"]


async def test_a_nats_that_has_lost_its_store_is_used_again(
    children: Children, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bare_nats(children, "-js", "-sd", str(tmp_path / "store")) as server:
        monkeypatch.setenv("NATS_SERVER", server.url)
        async with open_sessions(namespace) as sessions, open_notes(namespace) as notes:
            await turn(sessions, "a", conversation="c")
            await kill(server.child)
            shutil.rmtree(tmp_path / "store")
            await start_again(server.child)

            async def is_back() -> bool:
                return await said(sessions, conversation="c") == []

            await until(is_back, but="unavailable")
            await turn(sessions, "b", conversation="c")
            await notes.write_note("x", ToolContext("bob", "s"))


async def test_while_nats_is_away_runs_are_refused_at_once(
    nats: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sessions(namespace) as sessions, open_notes(namespace) as notes:
        last = await turn(sessions, "a", conversation="c")
        await kill(nats.child)
        monkeypatch.setattr(kv_bucket, "ANSWER_S", 0.5)
        async with asyncio.timeout(20):
            for wanted in (request(conversation="c"), request(previous_response_id=last)):
                with pytest.raises(PipelineError, match="The store in NATS is unav") as caught:
                    await sessions.begin(wanted)
                assert caught.value.info.kind == "unavailable"
            assert await refused(sessions.get(last)) == "unavailable"
            assert await refused(sessions.delete(last)) == "unavailable"
            with pytest.raises(ToolError) as failed:
                await notes.write_note("x", ToolContext("bob", "s"))
            assert failed.value.transient
            async with await sessions.begin(request(store=False)) as session:
                await session.commit([], ENDED)  # needs no store


async def test_a_run_that_ends_while_nats_is_away_is_stored_when_it_is_back(
    nats: Server, namespace: str
) -> None:
    async with open_sessions(namespace) as sessions:
        await turn(sessions, "a", conversation="c")
        async with await sessions.begin(request("b", conversation="c")) as session:
            await kill(nats.child)
            committing = asyncio.create_task(session.commit([], ENDED))
            await start_again(nats.child)
            await committing
        assert await said(sessions, conversation="c") == ["a", "re: a", "b"]


async def test_a_run_that_cannot_be_stored_says_so(
    nats: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_sessions(namespace) as sessions,
        await sessions.begin(request("b", conversation="c")) as session,
        asyncio.timeout(20),
    ):
        await kill(nats.child)
        monkeypatch.setattr(kv_bucket, "ANSWER_S", 0.3)
        monkeypatch.setattr("chapter4.session.COMMIT_S", 0.5)
        assert await refused(session.commit([], ENDED)) == "unavailable"


async def test_nats_without_jetstream_is_named_at_the_start(
    children: Children, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bare_nats(children) as server:
        monkeypatch.setenv("NATS_SERVER", server.url)
        address = server.url.removeprefix("nats://")
        with pytest.raises(ComponentError, match=rf"{address} has no JetStream.*-js"):
            async with open_sessions(namespace):
                pass


async def test_no_nats_at_the_start(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_bucket, "CONNECT_S", 0.5)
    monkeypatch.setenv("NATS_SERVER", f"nats://{LOOPBACK}:{free_port()}")
    with pytest.raises(ComponentError, match="NATS at 127"):
        async with open_sessions(namespace):
            pass


@pytest.mark.parametrize(
    ("arguments", "credentials"),
    [(("--user", "bob", "--pass", "p@ss%20w"), "bob:p%40ss%2520w"), (("--auth", "t0k"), "t0k")],
)
async def test_credentials_in_the_address(
    children: Children,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    arguments: tuple[str, ...],
    credentials: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(kv_bucket, "CONNECT_S", 5.0)  # some attempts, of which one hears why
    async with bare_nats(children, "-js", "-sd", str(tmp_path), *arguments) as server:
        address = server.url.removeprefix("nats://")
        monkeypatch.setenv("NATS_SERVER", f"nats://{credentials}@{address}")
        async with open_sessions(namespace) as sessions:
            await turn(sessions, "a", conversation="c")
            assert await said(sessions, conversation="c") == ["a", "re: a"]
        monkeypatch.setenv("NATS_SERVER", f"nats://eve:secret@{address}")
        with pytest.raises(ComponentError, match=f"(?i)NATS at {address}: .*authorization") as no:
            async with open_sessions(namespace):
                pass
    assert "secret" not in str(no.value) + caplog.text
    assert credentials not in caplog.text


async def test_another_ttl_than_before_is_taken_over(nats: Server, namespace: str) -> None:
    async with open_sessions(namespace, SessionSettings(ttl_s=1000)) as sessions:
        last = await turn(sessions, "a")
    async with open_sessions(namespace, SessionSettings(ttl_s=60)) as sessions:
        assert (await sessions.get(last)).id == last
        status = await sessions._store._bucket._kv.status()
        assert status.ttl == 60
        assert status.stream_info.config.duplicate_window == 60


async def test_an_agent_that_is_killed_keeps_its_session_for_seconds_only(
    nats: Server, namespace: str
) -> None:
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, namespace),
        env={**os.environ, "NATS_SERVER": nats.url},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert await asyncio.wait_for(holder.stdout.readline(), 60) == b"claimed\n"
        async with open_sessions(namespace) as sessions:
            assert await refused(sessions.begin(request(conversation="c"))) == "conflict"
            holder.kill()
            await holder.wait()

            async def is_free() -> bool:
                return await turn(sessions, "b", conversation="c") != ""

            await until(is_free, but="conflict")
    finally:
        if holder.returncode is None:
            holder.kill()
        await holder.wait()
