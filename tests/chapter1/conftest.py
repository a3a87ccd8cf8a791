"""A pipeline that the tests of one module share, for tests that leave it as it was."""

import uuid
from collections.abc import AsyncIterator

from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from tests.chapter1.helpers import engine_settings, http_client, nothing_in_flight

import httpx
import pytest_asyncio


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_pipeline(servers: dict[str, str]) -> AsyncIterator[Pipeline]:
    """A pipeline with a simulated engine of 50 tokens/s, small limits and all log lines."""
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        options = Options(
            namespace=f"test-{uuid.uuid4().hex[:12]}", backend="simulated", port=free_port()
        )
        arguments = {
            "engine": [
                "--log-level=debug",
                *engine_settings(decode_base_ms=20, mean_output_tokens=8),
            ],
            "processor": ["--log-level=debug"],
            "frontend": ["--log-level=debug", "--max-in-flight=8", "--max-body-bytes=65536"],
        }
        environment = {**servers, "DYN_LOG": "warn"}
        async with pipeline(
            children, environment, "chapter1", options, arguments=arguments
        ) as running:
            await running.wait_ready()
            yield running
            running.kill()
    print(*lines[-200:], sep="\n")


@pytest_asyncio.fixture
async def api(shared_pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shared pipeline, in which the requests of earlier tests have ended."""
    async with http_client(shared_pipeline.url) as client:
        await nothing_in_flight(client)
        yield client
