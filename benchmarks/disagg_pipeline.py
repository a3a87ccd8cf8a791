"""Chapter 3's pipeline with two engines whose roles and chunk sizes change from run to run."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.disagg_engine import FOLDER
from benchmarks.disagg_engines import Engines
from benchmarks.disagg_records import EngineRecords, read_records
from benchmarks.report import GuardError
from common.protocol import from_wire
from common.protocol_routing import RoutedWorkerState
from common.protocol_transfer import Role
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from launch.servers import etcd_server, nats_server, server_environment

from dynamo.runtime import Client, DistributedRuntime

ENGINES = 2
CORES = 2
NAMESPACE = "disagg"
POLICY = "earliest_start"
READY_S = 20.0
Agrees = Callable[[list[RoutedWorkerState]], bool]  # given those of all engines


@dataclass(frozen=True)
class Mode:
    """How the two engines share the work.

    `chunk` is the prefill chunk size, in tokens, of the engines that decode. `remote_tokens`:
    an engine for prefill computes prompts with so many tokens to compute; None: there is none.
    """

    name: str
    chunk: int
    remote_tokens: int | None = None

    @property
    def roles(self) -> tuple[Role, Role]:
        return ("aggregated", "aggregated") if self.remote_tokens is None else ("prefill", "decode")

    def engine_arguments(self, worker: int, engines: Engines) -> list[str]:
        role = self.roles[worker]
        chunk = engines.prefill_chunk if role == "prefill" else self.chunk
        settings = (*engines.settings, f"prefill_chunk={chunk}")
        words = [word for setting in settings for word in ("--engine-arg", setting)]
        return ["--backend", engines.backend, "--role", role, *words]


class Bench:
    """A running pipeline whose engines and router are started anew for every run."""

    def __init__(
        self,
        chapter: Pipeline,
        engines: Engines,
        port: int,
        folder: Path,
        clear: Client,
        state: Client,
    ) -> None:
        self.chapter, self.engines, self.port, self.folder = chapter, engines, port, folder
        self._clear, self._state = clear, state
        self._router = list(chapter.commands["router"])

    async def use(self, mode: Mode) -> None:
        """Start the engines in their roles, and the router."""
        engines = [f"engine{worker}" for worker in range(ENGINES)]
        running = [name for name in ("router", *engines) if name in self.chapter.processes]
        await asyncio.gather(*(self.chapter.processes.pop(name).stop() for name in running))
        for worker, name in enumerate(engines):
            self.chapter.commands[name] = [
                *(sys.executable, "-m", "benchmarks.disagg_engine"),
                *("--namespace", NAMESPACE, "--worker-id", str(worker)),
                *mode.engine_arguments(worker, self.engines),
            ]
        remote = () if mode.remote_tokens is None else (
            "--remote-prefill-tokens", str(mode.remote_tokens)
        )  # fmt: skip
        self.chapter.commands["router"] = [*self._router, *remote]
        for name in ("router", *engines):
            self.chapter.start(name)
        await self.chapter.wait_ready()
        await self.states(lambda states: [s.role for s in states] == list(mode.roles))

    async def clear_caches(self) -> None:
        for instance in self._clear.instance_ids():
            async for _ in await self._clear.direct({}, instance, annotated=False):
                pass
        await self.states(lambda states: not any(s.blocks or s.active for s in states))

    async def states(self, agrees: Agrees) -> list[RoutedWorkerState]:
        """What the router believes about the engines, by worker id, once that is as it should be.

        Raises:
            GuardError: it is not within `READY_S`.
        """
        until = time.monotonic() + READY_S
        states: list[RoutedWorkerState] = []
        while time.monotonic() < until:
            try:
                stream = await self._state.round_robin({}, annotated=False)
                states = [from_wire(item, RoutedWorkerState) async for item in stream]
            except Exception as error:  # the router before this one may still be listed
                print(f"waiting for the router: {error}", file=sys.stderr)
            states.sort(key=lambda state: state.worker_id)
            if [s.state for s in states] == ["ready"] * ENGINES and agrees(states):
                return states
            await asyncio.sleep(0.05)
        raise GuardError(f"the router's view is not what it should be: {states}")

    def records(self, begin: float, end: float) -> list[EngineRecords]:
        """What the engines wrote down, by worker id."""
        found = []
        for worker in range(ENGINES):
            pid = self.chapter.processes[f"engine{worker}"].pid
            found.append(read_records(self.folder / f"engine{worker}-{pid}.jsonl", begin, end))
        return found


@asynccontextmanager
async def bench(engines: Engines) -> AsyncIterator[Bench]:
    """The pipeline without its engines and its router, which `Bench.use` starts; on two cores.

    Raises:
        GuardError: this machine has fewer.
    """
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        raise GuardError(f"{CORES} cores are needed, there is {len(cores)}")
    os.sched_setaffinity(0, cores)  # the children's, too
    async with AsyncExitStack() as stack:
        children = stack.enter_context(Children())
        nats = await stack.enter_async_context(nats_server(children))
        etcd = await stack.enter_async_context(etcd_server(children))
        folder = children.new_path("records")
        folder.mkdir()
        environment = server_environment(nats.url, etcd.url)
        os.environ.update(environment)
        port = free_port()
        backend = engines.backend
        chapter = await stack.enter_async_context(
            pipeline(
                children,
                environment | {FOLDER: str(folder)},
                "chapter3",
                Options(NAMESPACE, engines=ENGINES, backend=backend, policy=POLICY, port=port),
                start=["processor", "frontend"],
                arguments={"router": ["--no-canaries"]},
            )
        )
        runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "nats")
        stack.callback(runtime.shutdown)
        clear = await runtime.endpoint(f"{NAMESPACE}.engine.clear_kv_blocks").client()
        state = await runtime.endpoint(f"{NAMESPACE}.router.state").client()
        yield Bench(chapter, engines, port, folder, clear, state)
