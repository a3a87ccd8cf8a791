"""An engine that is closed or dies leaves nothing behind, and nobody waits for it."""

import asyncio
import json
import os
import sys
import tempfile
from typing import Any

from tests.contract.backends import DEFAULT_BACKENDS, Backend
from tests.project_files import ROOT

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def probe(action: str, name: str, config: pytest.Config) -> dict[str, Any]:
    """What `lifecycle_probe` reports."""
    model, flags = config.getoption("--engine-model"), config.getoption("--engine-flags")
    # A short path, because sockets are made there.
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.contract.lifecycle_probe", action),
            *(name, model or "", flags),
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-4000:]
    report: dict[str, Any] = json.loads(output.decode().splitlines()[-1])
    return report


async def test_a_closed_engine(backend: Backend, request: pytest.FixtureRequest) -> None:
    """Requests end as cancelled, later ones are refused; no process, thread, file is left."""
    report = await probe("close", backend.name, request.config)
    assert report["ends"] == ["cancelled", "cancelled"]
    assert report["closed"] == "unavailable"
    assert report["left"] == []
    assert report["threads"] == ["MainThread"]
    assert report["files"] == []
    assert report["tasks"] == 0
    assert (report["processes"] > 0) == (backend.name not in DEFAULT_BACKENDS)


async def test_an_engine_whose_processes_die(
    external: Backend, request: pytest.FixtureRequest
) -> None:
    """It says that it failed, and so does every request; closing it still works."""
    report = await probe("kill", external.name, request.config)
    assert report["failed"]
    assert report["ends"] == ["internal", "internal"]
    assert report["next"] == "internal"
    assert report["left"] == []
    assert report["files"] == []
