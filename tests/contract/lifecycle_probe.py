"""Starts an engine in a process of its own, ends it, and prints what is left as one JSON line.

lifecycle_probe.py close|kill BACKEND MODEL FLAGS: "close" closes it while it generates; "kill"
first kills the processes that it has started. TMPDIR is to be empty. stdout may have the engine's
own lines before that.
"""

import asyncio
import json
import multiprocessing.resource_tracker
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from common.engines.base import Engine
from common.protocol import PipelineError
from tests.common.engines.engine_helpers import FakeContext
from tests.contract.backends import backend_of
from tests.contract.test_cancellation import ENDLESS

import psutil


async def main(action: str, name: str, model: str, flags: str) -> dict[str, Any]:
    engine = await backend_of(name, model or None, flags).start()
    children = own_children()
    running = asyncio.Event()
    reading = [asyncio.create_task(read(engine, running)) for _ in range(2)]
    await running.wait()
    report: dict[str, Any] = {"processes": len(children)}
    if action == "kill":
        for child in children:
            child.kill()
        async with asyncio.timeout(30):
            report["failed"] = str(await engine.failed)
        report["ends"] = await asyncio.gather(*reading)
        report["next"] = await read(engine, running)
    await engine.close()
    report.setdefault("ends", await asyncio.gather(*reading))
    report["closed"] = await read(engine, running)
    report["left"] = [" ".join(child.cmdline()) for child in own_children()]
    report["tasks"] = len(asyncio.all_tasks()) - 1
    return report


async def read(engine: Engine, running: asyncio.Event) -> str:
    """How a request ends."""
    reason = None
    try:
        async for item in engine.generate(ENDLESS, FakeContext()):
            reason = item.finish_reason
            running.set()
    except PipelineError as error:
        return error.info.kind
    return str(reason)


def own_children() -> list[psutil.Process]:
    """Without the process that Python itself starts once and keeps."""
    tracker = multiprocessing.resource_tracker._resource_tracker
    keeps = getattr(tracker, "_pid", None)
    return [p for p in psutil.Process().children(recursive=True) if p.pid != keeps]


def files() -> list[str]:
    """What is in the folder for temporary files, but for what torch keeps for next time."""
    names = [path.name for path in Path(tempfile.gettempdir()).iterdir()]
    return [name for name in names if not name.startswith("torchinductor")]


if __name__ == "__main__":
    report = asyncio.run(main(*sys.argv[1:]))
    report["files"] = files()
    report["threads"] = [t.name for t in threading.enumerate() if not t.daemon]
    print(json.dumps(report), flush=True)
