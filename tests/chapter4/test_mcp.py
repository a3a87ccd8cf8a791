"""Tools of MCP servers: good servers are of use, bad ones do no harm."""

import argparse
import asyncio
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from chapter4 import mcp_http, mcp_tools
from chapter4.mcp_target import McpTarget
from chapter4.toolbox import add_tool_arguments, open_toolbox
from chapter4.tools import Tool
from common.errors import ComponentError
from common.protocol_agent import ToolSet
from launch.children import Children
from launch.ports import free_port
from tests.chapter4.tool_calls import call, named
from tests.project_files import ROOT

import psutil
import pytest

HERE = ROOT / "tests" / "chapter4"
GOOD = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'mcp_server.py'))}"
BAD = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'bad_mcp_server.py'))}"


@asynccontextmanager
async def connected(target: str) -> AsyncIterator[list[Tool]]:
    parser = argparse.ArgumentParser()
    add_tool_arguments(parser)
    async with open_toolbox(parser.parse_args(["--mcp", f"test={target}"])) as toolbox:
        yield toolbox.tools(ToolSet("test"))


Bad = Callable[..., AbstractAsyncContextManager[list[Tool]]]


@pytest.fixture
def bad(tmp_path: Path) -> Bad:
    """Connect to the bad server: `async with bad() as tools`."""
    return lambda fault="": connected(f"{BAD} {shlex.quote(str(tmp_path))} {fault}")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The package logs each line that is no message with its traceback."""
    logger = logging.getLogger("mcp")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def listening(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)


async def gone(pid: int) -> None:
    async with asyncio.timeout(60):
        while alive(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_the_tools_of_a_server_over_stdio_are_used() -> None:
    async with connected(GOOD) as tools:
        add = named(tools, "add")
        assert add.description == "Add two numbers."
        assert add.parameters["required"] == ["a", "b"]
        results = await asyncio.gather(*(call(add, a=n, b=1) for n in range(5)))
        assert [result.output for result in results] == ["1", "2", "3", "4", "5"]
        assert (await call(add, a="x", b=1)).attempts == 0


async def test_the_tools_of_a_server_over_http_are_used(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_http, "MAX_BYTES", 100_000)
    port = free_port()
    children.start("mcp", [sys.executable, str(HERE / "mcp_server.py"), str(port)], os.environ)
    await listening(port)
    async with connected(f"http://127.0.0.1:{port}/mcp") as tools:
        assert (await call(named(tools, "add"), a=1, b=2)).output == "3"
        big = await call(named(tools, "big"), size=1_000_000)
        assert "more than 100000 bytes" in str(big.error)
        assert (await call(named(tools, "add"), a=1, b=2)).output == "3"


async def test_what_a_server_says_becomes_text(bad: Bad) -> None:
    async with bad() as tools:
        assert (await call(named(tools, "parts"))).output == "one\n[image is not shown]\ntwo"
        assert (await call(named(tools, "fail"))).error == "no such city"
        assert (await call(named(tools, "wrong"))).error is not None
        assert named(tools, "die_reading").description == "To die_reading."


async def test_tools_that_cannot_be_used_are_left_out(
    bad: Bad, caplog: pytest.LogCaptureFixture
) -> None:
    async with bad() as tools:
        names = [tool.name for tool in tools]
    assert {"far", "huge", "no good name"}.isdisjoint(names)
    assert names.count("pid") == 1
    assert "'far' is left out: refers to another document" in caplog.text


async def test_a_server_has_no_secret_of_ours(bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    async with bad() as tools:
        names = set((await call(named(tools, "environment"))).output.split())
    assert names <= {"HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE"}


async def test_a_call_that_hangs_ends_and_its_server_goes_with_the_agent(
    bad: Bad, tmp_path: Path
) -> None:
    async with bad() as tools:
        pid = int((await call(named(tools, "pid"))).output)
        task = asyncio.create_task(call(named(tools, "hang")))
        while not os.path.lexists(tmp_path / "hanging"):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert alive(pid)
    await gone(pid)


@pytest.mark.parametrize(("name", "attempts"), [("die", 1), ("die_reading", 2)])
async def test_a_server_that_died_is_started_again(bad: Bad, name: str, attempts: int) -> None:
    """A call that it may have carried out is repeated only if the tool changes nothing."""
    async with bad() as tools:
        before = (await call(named(tools, "pid"))).output
        died = await call(named(tools, name))
        assert died.attempts == attempts
        assert (died.error is None) == (attempts == 2)
        assert (await call(named(tools, name))).output == "alive"
        assert (await call(named(tools, "pid"))).output != before


async def test_a_server_that_died_between_calls_is_started_again(bad: Bad) -> None:
    async with bad() as tools:
        before = int((await call(named(tools, "pid"))).output)
        os.kill(before, signal.SIGKILL)
        await gone(before)
        after = await call(named(tools, "pid"))
        while after.error is not None:  # the end was not seen yet
            after = await call(named(tools, "pid"))
        assert int(after.output) != before


@pytest.mark.parametrize("name", ["flood", "big"])
async def test_a_line_without_end_fills_no_memory(bad: Bad, name: str) -> None:
    async with bad() as tools:
        before = psutil.Process().memory_info().rss
        flooded = await call(named(tools, name))
        assert flooded.error == "MCP server test: Connection closed"
        assert psutil.Process().memory_info().rss - before < 100 * 2**20
        assert (await call(named(tools, "pid"))).error is None


async def test_rubbish_between_messages_is_passed_over(bad: Bad) -> None:
    async with bad() as tools:
        assert (await call(named(tools, "rubbish"))).output == "still here"
        assert (await call(named(tools, "pid"))).error is None


async def test_what_a_tool_returns_is_not_checked_by_the_servers_schema(bad: Bad) -> None:
    """It may hold a regular expression that takes for ever; this process would stand still."""
    async with bad() as tools:
        assert (await call(named(tools, "structured"))).output == "still here"
        await call(named(tools, "die"))  # what is connected again does not check, either
        assert (await call(named(tools, "structured"))).output == "still here"


async def test_what_a_server_started_ends_with_it(bad: Bad) -> None:
    async with bad() as tools:
        pid = int((await call(named(tools, "child"))).output)
        assert alive(pid)
    await gone(pid)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/no/such/program --flag", "Connection closed"),
        (f"{BAD} . ends", "Connection closed"),
        (f"{BAD} . floods", "Connection closed"),
        (f"{BAD} . silent", "no answer within"),
        (f"{BAD} . many", "no tools: it has more than 100"),
        (f"{BAD} . many_pages", "no tools: it has more than 100"),
        (f"{BAD} . endless", "no tools: it has pages without any"),
        ("http://127.0.0.1:1/mcp", "connection"),
    ],
)
async def test_a_server_that_does_not_serve_is_named(
    monkeypatch: pytest.MonkeyPatch, target: str, reason: str
) -> None:
    if "silent" in target:
        monkeypatch.setattr(mcp_tools, "CONNECT_TIMEOUT_S", 0.5)
    with pytest.raises(ComponentError, match=f"MCP server test: .*{reason}"):
        async with connected(target):
            raise AssertionError


AGENT = """
import asyncio, sys
from chapter4.mcp_target import McpTarget
from chapter4.mcp_tools import McpServer
async def main():
    server = McpServer(McpTarget.parse(sys.argv[1]))
    await server.tools()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def killed_agent(tmp_path: Path) -> int:
    """The process of a server whose agent is killed without a word."""
    target = f"test={BAD} {shlex.quote(str(tmp_path))} deaf"
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, target], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as agent:
        try:
            assert agent.stdout is not None
            assert agent.stdout.readline() == "ready\n"
        finally:
            agent.kill()
    return int((tmp_path / "pid").read_text())


async def test_a_server_ends_with_an_agent_that_was_killed(killed_agent: int) -> None:
    """Also one that does not notice by itself."""
    await gone(killed_agent)


def test_targets_are_read_from_the_command_line() -> None:
    assert McpTarget.parse("a=npx 'my server' --x=1") == McpTarget(
        "a", command=("npx", "my server", "--x=1")
    )
    assert McpTarget.parse("a-1=https://x.example/mcp?k=v") == McpTarget(
        "a-1", url="https://x.example/mcp?k=v"
    )
    for text in ("", "a", "a=", "=x", "a b=x", "a='x"):
        with pytest.raises(ValueError, match="is no"):
            McpTarget.parse(text)
