"""The peer of the relay benchmark: Dynamo's own frontend (Rust) before the same engine."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from common import RUNTIME_DEFAULTS
from launch.children import Children

import httpx

PEER_VERSION = "1.6.1"
LISTED_TIMEOUT_S = 60.0
LISTED_CHECK_S = 0.1


class PeerUnavailableError(Exception):
    """The peer cannot be installed here; the message says why."""


def install_peer(cache: Path) -> Path:
    """Install Dynamo's Python wheel into a folder of its own; returns the folder.

    Without its dependencies: one of them is a placeholder that downloads from elsewhere, and
    the frontend needs none but these three.

    Raises:
        PeerUnavailableError: pip could not install it.
    """
    folder = cache / f"ai-dynamo-{PEER_VERSION}"
    if (folder / "complete").exists():
        return folder
    packages = [f"ai-dynamo=={PEER_VERSION}", "packaging", "msgspec", "pyyaml"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command = [*pip, "--upgrade", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerUnavailableError(f"pip install ai-dynamo failed: {done.stderr.strip()[-300:]}")
    (folder / "complete").touch()
    return folder


@asynccontextmanager
async def peer_pipeline(
    children: Children,
    environment: Mapping[str, str],
    *,
    installed: Path,
    model: Path,
    namespace: str,
    port: int,
    engine_args: list[str],
    batch_items: bool,
) -> AsyncIterator[None]:
    """Run the peer: one engine process, one frontend process; ready when the block begins.

    Raises:
        PeerUnavailableError: its frontend did not find its engine.
    """
    path = [str(installed), os.environ.get("PYTHONPATH", "")]
    peer_environment = {
        # Our components set these themselves; the peer's frontend gets the same.
        **{name: os.environ[name] for name in RUNTIME_DEFAULTS},
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "DYN_NAMESPACE": namespace,
    }
    python = [sys.executable, "-m"]
    worker = children.start(
        f"{namespace}-engine",
        [*python, "benchmarks.peer_worker", "--model", str(model), "--namespace", namespace]
        + [flag for argument in engine_args for flag in ("--engine-arg", argument)]
        + (["--batch-items"] if batch_items else []),
        peer_environment,
    )
    frontend = children.start(
        f"{namespace}-frontend",
        [*python, "dynamo.frontend", "--http-port", str(port), "--router-mode", "round-robin"],
        peer_environment,
    )
    try:
        await worker.wait_ready()
        await _until_model_is_listed(port)
        yield
    finally:
        await frontend.stop()
        await worker.stop()


async def _until_model_is_listed(port: int) -> None:
    """The peer has no readiness message, only a model list that is empty at first."""
    async with httpx.AsyncClient(trust_env=False) as client:
        deadline = time.monotonic() + LISTED_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                answer = await client.get(f"http://127.0.0.1:{port}/v1/models")
            except httpx.TransportError:
                pass
            else:
                if answer.json()["data"]:
                    return
            await asyncio.sleep(LISTED_CHECK_S)
    raise PeerUnavailableError(f"its frontend lists no model after {LISTED_TIMEOUT_S:.0f} s")
