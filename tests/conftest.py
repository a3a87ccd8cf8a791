"""Servers and pipelines for the tests: real processes on free ports, gone after each test."""

import os
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from launch import child
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import FREE_PORTS, free_port
from launch.servers import etcd_server, nats_server, server_environment

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

# How long an example takes says more about the other programs of the machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
child.LOG_LINES = 100_000  # tests look for lines, which must not scroll off while they do

# Files that take half a minute and more, the longest first: they begin before the others, so that
# in the end no worker of pytest-xdist has to wait for another one.
LONG_FILES = (
    "test_readme.py",
    "chapter2/test_failures.py",
    "chapter1/test_failures.py",
    "test_setup.py",
    "test_launch.py",
    "chapter3/test_migration_in_use.py",
    "chapter4/test_tool_calls.py",
    "chapter4/test_sessions_in_use.py",
    "chapter4/test_sandbox.py",
)

StartPipeline = Callable[..., AbstractAsyncContextManager[Pipeline]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="a test that skips because the machine lacks something fails",
    )
    parser.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help="run tests/contract with this engine; may repeat (llamacpp and simulated)",
    )
    parser.addoption("--engine-model", metavar="PATH", help="its model, for tests/contract")
    parser.addoption(
        "--engine-flags", default="", metavar="FLAGS", help="of sglang and vllm, for tests/contract"
    )


def ports_of_worker(number: int, workers: int) -> range:
    """Workers of pytest-xdist, and what they start, do not give each other's ports to servers."""
    share = len(FREE_PORTS) // workers
    return FREE_PORTS[number % workers * share :][:share]


def pytest_configure() -> None:
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        ports = ports_of_worker(int(worker.removeprefix("gw")), workers)
        os.environ["FREE_PORTS"] = f"{ports[0]}-{ports[-1]}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Of `-n auto`: two, none for a single file; PYTEST_XDIST_AUTO_NUM_WORKERS says otherwise."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    order = {here / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("no_skips"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"with --no-skips this is a failure: {reason}"
    return report


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def servers() -> AsyncIterator[dict[str, str]]:
    """NATS and etcd, one of each for the worker: the environment that names them."""
    with Children() as children:
        async with nats_server(children) as nats, etcd_server(children) as etcd:
            yield server_environment(nats.url, etcd.url)


@pytest.fixture
def namespace() -> str:
    """A namespace of the test's own on the shared servers."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def children() -> Iterator[Children]:
    """Owns the test's processes; what they print is shown if the test fails."""
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        yield children
    print(*lines, sep="\n")


@pytest.fixture
def start_pipeline(children: Children, servers: dict[str, str], namespace: str) -> StartPipeline:
    """Start a pipeline: `async with start_pipeline(engines=2) as p:` and use `p.url`.

    Options of the launcher by name; `start` names the processes to start now (default all);
    `wait=False` does not wait until they are ready; `arguments` adds command-line arguments
    by component; `environment` replaces that of the shared servers. What has not been stopped
    at the end of the block is killed: how components drain is the subject of tests of its own.
    """

    @asynccontextmanager
    async def start_one(
        *,
        chapter: str = "chapter1",
        backend: str = "simulated",
        engines: int = 1,
        prefill: int = 0,
        routers: int = 1,
        model: str | None = None,
        start: Sequence[str] | None = None,
        wait: bool = True,
        arguments: Mapping[str, Sequence[str]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Pipeline]:
        options = Options(
            namespace=namespace,
            engines=engines,
            prefill=prefill,
            routers=routers,
            backend=backend,
            model=model,
            port=free_port(),
        )
        async with pipeline(
            children,
            environment or servers,
            chapter,
            options,
            start=start,
            arguments=arguments,
        ) as running:
            if wait:
                await running.wait_ready()
            yield running
            running.kill()

    return start_one
