"""A chapter 4 pipeline whose engine says what a script tells it."""

import json
import sys
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port

CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'


@asynccontextmanager
async def scripted_pipeline(
    servers: Mapping[str, str],
    folder: Path,
    script: Sequence[tuple[str, str]],
    arguments: Mapping[str, Sequence[str]] | None = None,
) -> AsyncIterator[Pipeline]:
    """All of chapter 4 but the words; what it logged is printed at the end."""
    file = folder / "script.json"
    file.write_text(json.dumps(script))
    lines: list[str] = []
    namespace = f"test-{uuid.uuid4().hex[:12]}"
    options = Options(namespace=namespace, engines=1, backend="simulated", port=free_port())
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        async with pipeline(
            children, servers, "chapter4", options, start=(), arguments=arguments
        ) as running:
            running.commands["engine0"] = [
                *(sys.executable, "-m", "tests.chapter4.scripted_engine"),
                *running.commands["engine0"][3:],
                f"--engine-arg={file}",
            ]
            for name in running.commands:
                running.start(name)
            await running.wait_ready()
            yield running
            running.kill()
    print(*lines[-200:], sep="\n")
