"""Calls of endpoints for the tests, and a pipeline that the tests of one module share."""

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from tests.chapter1.helpers import engine_settings, http_client
from tests.chapter3.helpers import Router, RuntimeCaller, start_caller

import httpx
import pytest
import pytest_asyncio

RouterOf = Callable[[Pipeline], Router]


@pytest.fixture(scope="session")
def runtime_caller(servers: dict[str, str]) -> Iterator[RuntimeCaller]:
    with start_caller({**os.environ, **servers}) as process:
        yield RuntimeCaller(process)  # it ends with its standard input


@pytest.fixture
def router_of(runtime_caller: RuntimeCaller) -> RouterOf:
    """`router_of(running)` is the router of a pipeline on the shared servers."""
    return lambda running: Router(runtime_caller, running)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_pipeline(
    servers: dict[str, str], runtime_caller: RuntimeCaller
) -> AsyncIterator[Pipeline]:
    """A pipeline with four simulated engines of 50 tokens/s and all log lines."""
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        options = Options(
            namespace=f"test-{uuid.uuid4().hex[:12]}", backend="simulated", port=free_port()
        )
        debug = ["--log-level=debug"]
        arguments = {
            "engine": [*debug, *engine_settings(decode_base_ms=20)],
            "router": debug,
            "processor": debug,
            "frontend": debug,
        }
        async with pipeline(children, servers, "chapter3", options, arguments=arguments) as running:
            await running.wait_ready()
            await Router(runtime_caller, running).wait_ready(4)
            yield running
            running.kill()
    print(*lines[-200:], sep="\n")


@pytest_asyncio.fixture
async def api(shared_pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shared pipeline."""
    async with http_client(shared_pipeline.url) as client:
        yield client


@pytest.fixture
def router(shared_pipeline: Pipeline, router_of: RouterOf) -> Router:
    """The shared pipeline's router."""
    return router_of(shared_pipeline)
