"""The agent's own tools, apart from those that have a file of their own."""

import asyncio
from typing import Annotated

from chapter4 import sandbox_policy
from chapter4.documents import Documents
from chapter4.sandbox import SandboxError, remove_left_folders, run_python
from chapter4.tools import Tool, ToolError, function_tool

from pydantic import Field

MAX_QUERY = 300  # characters


def document_tools(documents: Documents) -> list[Tool]:
    def search_documents(
        query: Annotated[
            str, Field(min_length=1, max_length=MAX_QUERY, description="words to look for")
        ],
        limit: Annotated[int, Field(ge=1, le=10, description="how many passages at most")] = 3,
    ) -> str:
        """Search the documents and notes for the passages that fit a question best."""
        found = documents.search(query, limit)
        if not found:
            return "Nothing was found."
        return "\n\n".join(
            f"[{passage.name}, from line {passage.line}]\n{passage.text}" for passage in found
        )

    def read_document(
        name: Annotated[str, Field(max_length=300, description="as search_documents gives it")],
    ) -> str:
        """Read a whole document."""
        try:
            return documents.read(name)
        except KeyError as error:
            names = ", ".join(documents.names()[:50])
            raise ToolError(f"there is no document {name!r}; there are {names}") from error

    return [function_tool(search_documents), function_tool(read_document)]


def python_tool() -> Tool:
    remove_left_folders()
    at_once = asyncio.Semaphore(sandbox_policy.AT_ONCE)

    async def python(
        code: Annotated[str, Field(min_length=1, description="prints what is to be known")],
    ) -> str:
        """Run Python code: its standard library, no network; files last for this call alone."""
        async with at_once:
            try:
                finished = await run_python(code)
            except SandboxError as error:
                raise ToolError(str(error)) from error
        note = f"[exit status {finished.status}]" if finished.status else ""
        return f"{finished.output}{note}" or "It printed nothing."

    # Four may run and as many wait in that time.
    return function_tool(python, timeout_s=2 * sandbox_policy.WALL_S + 5)
