"""One engine of each chosen backend for the whole run."""

from collections.abc import AsyncIterator

from common.engines.base import Engine
from common.engines.llama_capi import Vocab
from common.kv_mirror import KvMirror
from common.model_files import DEFAULT_MODEL, find_model
from tests.contract.backends import BACKENDS, DEFAULT_BACKENDS, Backend, backend_of

import pytest
import pytest_asyncio


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("backend") or DEFAULT_BACKENDS
        for name in names:
            if name not in BACKENDS:
                raise pytest.UsageError(f"--backend {name}: not one of {', '.join(BACKENDS)}")
        metafunc.parametrize("backend", names, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which of the tests make sense, and how long they may take."""
    kept: list[pytest.Item] = []
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("backend")  # type: ignore[attr-defined]
        if name in DEFAULT_BACKENDS and "external" in getattr(item, "fixturenames", ()):
            continue
        if name in BACKENDS and name not in DEFAULT_BACKENDS:
            # The first test of all waits until the engine has started.
            item.add_marker(pytest.mark.timeout(600), append=False)
        kept.append(item)
    items[:] = kept


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    option = request.config.getoption
    return backend_of(request.param, option("--engine-model"), option("--engine-flags"))


@pytest.fixture(scope="session")
def external(backend: Backend) -> Backend:
    """For tests that only backends with processes of their own can have."""
    return backend


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(backend: Backend) -> AsyncIterator[Engine]:
    engine = await backend.start()
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mirror(engine: Engine) -> KvMirror:
    """What the engine's events say is in its cache, from its start on."""
    mirror = KvMirror()
    engine.subscribe(mirror.apply)
    return mirror


@pytest.fixture(scope="session")
def vocab() -> Vocab:
    """The vocabulary of SmolLM2, by which all backends of these tests go."""
    return Vocab(find_model(DEFAULT_MODEL))
