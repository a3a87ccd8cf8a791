"""Chapter 4's pipeline, without its frontend and its agent, for scripted agents to talk to."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from benchmarks.report import GuardError
from common.protocol import (
    EngineOutput,
    GenerateRequest,
    PipelineError,
    SamplingParams,
    TextOutput,
    from_wire,
    to_wire,
)
from common.protocol_routing import (
    PolicyState,
    RoutedProcessRequest,
    RoutedWorkerState,
    RoutingHints,
)
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.servers import etcd_server, nats_server, server_environment

from dynamo.runtime import Client, DistributedRuntime

NAMESPACE = "agent-bench"
READY_S = 20.0
# Nobody is refused: all policies are to do the same work.
QUEUE = ("--queue-timeout", "600", "--max-queue", "10000", "--no-canaries")


@dataclass(frozen=True)
class Engines:
    """What the engines are; `cache_tokens` is what each has room for."""

    backend: str
    count: int
    cache_tokens: int
    settings: tuple[str, ...]
    block_size: int = 16

    def arguments(self) -> list[str]:
        cache = (f"cache_tokens={self.cache_tokens}", f"block_size={self.block_size}")
        return [w for setting in (*self.settings, *cache) for w in ("--engine-arg", setting)]


@dataclass(frozen=True)
class Answer:
    """Seconds from the request to the first token and to the end, and what it took."""

    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    worker_id: int | None


class Bench:
    """A running pipeline; `use` starts the router with the policy to be measured."""

    def __init__(
        self, chapter: Pipeline, engines: Engines, model: str, clients: dict[str, Client]
    ) -> None:
        self.chapter, self.engines, self.model = chapter, engines, model
        self._clients = clients
        self._router = list(chapter.commands["router"])

    async def use(self, policy: str) -> None:
        """Start the router anew, with engines that have nothing cached."""
        if "router" in self.chapter.processes:
            await self.chapter.processes.pop("router").stop()
        for instance in self._clients["clear_kv_blocks"].instance_ids():
            clear = self._clients["clear_kv_blocks"]
            async for _ in await clear.direct({}, instance, annotated=False):
                pass
        self.chapter.commands["router"] = [*self._router, "--policy", policy]
        await self.chapter.start("router").wait_ready()
        await self.states(lambda states: not any(state.blocks for state in states))

    async def ask(self, tokens: list[int], max_tokens: int, hints: RoutingHints) -> Answer:
        """One request for exactly so many tokens; what it raises is a failed run."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = RoutedProcessRequest(self.model, prompt=tokens, sampling=sampling, hints=hints)
        sent = time.perf_counter()
        first: float | None = None
        stream = await self._clients["process"].round_robin(to_wire(request), annotated=False)
        last = TextOutput()
        async for item in stream:
            last = from_wire(item, TextOutput)
            if last.error is not None:
                raise PipelineError.of(last.error)
            if first is None and last.tokens:
                first = time.perf_counter()
        if first is None or last.usage is None:
            raise GuardError("an answer without tokens or token counts")
        if (last.usage.prompt_tokens, last.usage.completion_tokens) != (len(tokens), max_tokens):
            raise GuardError(f"{last.usage} instead of {len(tokens)} and {max_tokens} tokens")
        return Answer(
            first - sent,
            time.perf_counter() - sent,
            last.usage.prompt_tokens,
            last.usage.cached_tokens,
            last.worker_id,
        )

    async def prefill_s(self, tokens: list[int]) -> list[float]:
        """How long each engine takes for this prompt while the others compute it, too."""
        request = to_wire(GenerateRequest(tokens, SamplingParams(max_tokens=1, ignore_eos=True)))
        client = self._clients["generate"]

        async def one(instance: int) -> float:
            began = time.perf_counter()
            async for item in await client.direct(request, instance, annotated=False):
                if (error := from_wire(item, EngineOutput).error) is not None:
                    raise PipelineError.of(error)
            return time.perf_counter() - began

        return list(await asyncio.gather(*map(one, sorted(client.instance_ids()))))

    async def policy(self) -> PolicyState:
        (item,) = [i async for i in await self._clients["policy"].round_robin({}, annotated=False)]
        return from_wire(item, PolicyState)

    async def states(
        self, agrees: Callable[[list[RoutedWorkerState]], bool]
    ) -> list[RoutedWorkerState]:
        """What the router believes about the engines, once that is as it should be.

        Raises:
            GuardError: it is not within `READY_S`.
        """
        until = time.monotonic() + READY_S
        states: list[RoutedWorkerState] = []
        while time.monotonic() < until:
            try:
                stream = await self._clients["state"].round_robin({}, annotated=False)
                states = [from_wire(item, RoutedWorkerState) async for item in stream]
            except Exception as error:  # the router before this one may still be listed
                print(f"waiting for the router: {error}", file=sys.stderr)
            if [s.state for s in states] == ["ready"] * self.engines.count and agrees(states):
                return states
            await asyncio.sleep(0.05)
        raise GuardError(f"the router's view is not what it should be: {states}")


@asynccontextmanager
async def bench(engines: Engines, model: str) -> AsyncIterator[Bench]:
    """The pipeline without its router, which `Bench.use` starts."""
    async with AsyncExitStack() as stack:
        children = stack.enter_context(Children())
        nats = await stack.enter_async_context(nats_server(children))
        etcd = await stack.enter_async_context(etcd_server(children))
        environment = server_environment(nats.url, etcd.url)
        os.environ.update(environment)
        names = [f"engine{number}" for number in range(engines.count)]
        chapter = await stack.enter_async_context(
            pipeline(
                children,
                environment,
                "chapter4",
                Options(NAMESPACE, engines=engines.count, backend=engines.backend),
                start=[*names, "processor"],
                arguments={"engine": engines.arguments(), "router": QUEUE},
            )
        )
        await chapter.wait_ready()
        runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "nats")
        stack.callback(runtime.shutdown)
        clients: dict[str, Client] = {}
        for endpoint in (
            "engine.generate",
            "engine.clear_kv_blocks",
            "router.state",
            "router.policy",
            "processor.process",
        ):
            client = await runtime.endpoint(f"{NAMESPACE}.{endpoint}").client()
            clients[endpoint.partition(".")[2]] = client
        for name in ("generate", "clear_kv_blocks", "process"):
            await clients[name].wait_for_instances()
        until = time.monotonic() + READY_S
        while len(clients["generate"].instance_ids()) < engines.count:
            if time.monotonic() > until:
                raise GuardError(f"there are not {engines.count} engines")
            await asyncio.sleep(0.05)
        yield Bench(chapter, engines, model, clients)
