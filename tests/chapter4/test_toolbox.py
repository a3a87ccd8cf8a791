"""Which tools an agent has, and which of them a request gets."""

import argparse
import asyncio
from pathlib import Path

from chapter4.toolbox import Toolbox, add_tool_arguments, open_toolbox
from chapter4.tools import function_tool
from common.errors import ComponentError
from common.protocol import PipelineError
from common.protocol_agent import ToolSet
from tests.chapter4.tool_calls import call, named

import pytest


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_tool_arguments(parser)
    return parser.parse_args(words)


def names(toolbox: Toolbox, wanted: ToolSet) -> list[str]:
    return [tool.name for tool in toolbox.tools(wanted)]


BUILTIN = ["calculator", "date_time", "search_documents", "read_document", "python"]


async def test_the_builtin_tools_need_no_internet() -> None:
    async with open_toolbox(arguments()) as toolbox:
        assert names(toolbox, ToolSet("builtin")) == BUILTIN
        tools = toolbox.tools(ToolSet("builtin"))
        assert all(tool.description and tool.parameters["type"] == "object" for tool in tools)
        assert all(tool.parameters["additionalProperties"] is False for tool in tools)
        assert (
            await call(named(tools, "calculator"), expression="17% * 1200000")
        ).output == "204000"


async def test_http_get_is_there_when_a_host_is_allowed() -> None:
    async with open_toolbox(arguments("--allow-host", "a.example", "--allow-host", "b:81")) as box:
        assert names(box, ToolSet("builtin"))[-1] == "http_get"
        tool = named(box.tools(ToolSet("builtin")), "http_get")
        about = tool.parameters["properties"]["url"]["description"]
        assert about == "of one of these hosts: a.example, b:81"


async def test_other_tools_of_ours_can_be_added() -> None:
    def greet() -> str:
        """Greet."""
        return "hello"

    async with open_toolbox(arguments(), [function_tool(greet)]) as toolbox:
        assert names(toolbox, ToolSet("builtin")) == [*BUILTIN, "greet"]


async def test_a_request_gets_the_tools_that_it_allows() -> None:
    async with open_toolbox(arguments()) as toolbox:
        wanted = ToolSet("builtin", ["python", "calculator", "python"])
        assert names(toolbox, wanted) == ["python", "calculator"]
        assert names(toolbox, ToolSet("builtin", [])) == []


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (ToolSet("files"), "There is no tool set 'files'; there are: builtin."),
        (
            ToolSet("builtin", ["calculator", "http_get"]),
            "There is no tool of builtin 'http_get'; there are: calculator, date_time, "
            "search_documents, read_document, python.",
        ),
    ],
)
async def test_what_there_is_not_is_named(wanted: ToolSet, message: str) -> None:
    async with open_toolbox(arguments()) as toolbox:
        with pytest.raises(PipelineError) as caught:
            toolbox.tools(wanted)
    assert caught.value.info.kind == "invalid_request"
    assert caught.value.info.message == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--documents", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["--allow-host", "http://x"], "'http://x' is no HOST or HOST:PORT"),
        (["--mcp", "x"], "'x' is not LABEL=COMMAND… or LABEL=URL"),
        (["--mcp", "x='"], "is no command"),
        (["--mcp", "builtin=x"], "the label builtin is that of our own tools"),
    ],
)
def test_bad_arguments_are_named(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        arguments(*words)
    assert message in capsys.readouterr().err


async def test_two_servers_cannot_have_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(_: object) -> list[object]:
        return []

    monkeypatch.setattr("chapter4.mcp_tools.McpServer.tools", none)
    with pytest.raises(ComponentError, match="two MCP servers have the label a"):
        async with open_toolbox(arguments("--mcp", "a=x", "--mcp", "a=y")):
            raise AssertionError


async def test_the_folder_of_documents_can_be_chosen(tmp_path: Path) -> None:
    await asyncio.to_thread((tmp_path / "a.md").write_text, "# Bees\nhoney")
    async with open_toolbox(arguments("--documents", str(tmp_path))) as toolbox:
        tools = toolbox.tools(ToolSet("builtin"))
        found = await call(named(tools, "search_documents"), query="honey")
    assert found.output == "[a.md, from line 1]\n# Bees\nhoney"


async def test_the_time_is_told_where_one_asks() -> None:
    async with open_toolbox(arguments()) as toolbox:
        tool = named(toolbox.tools(ToolSet("builtin")), "date_time")
        assert (await call(tool)).output.endswith(" UTC (UTC+0000)")
        assert (await call(tool, timezone="Asia/Tokyo")).output.endswith(" JST (UTC+0900)")
        for zone in ("../../etc/passwd", "/etc/localtime", "Asia", "Nowhere/City", "\0"):
            result = await call(tool, timezone=zone)
            assert result.error == f"there is no time zone {zone!r}; names are like Asia/Tokyo"
