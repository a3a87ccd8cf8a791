"""A random life of a few engines, told to `policies.dynamo` and to Dynamo's own routers."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.router_fleet import BLOCK_SIZE, MODEL, Cached, Fleet, new_tokens
from benchmarks.router_peers import kv_router, selection_service
from chapter3.active import ActiveRequests
from chapter3.index import KvIndex, prefix_names
from chapter3.policies import dynamo
from chapter3.snapshot import RequestView, Snapshot
from chapter3.workers import Worker
from common.kv import KvEventBatch
from common.protocol import EngineInfo
from common.protocol_router import KvSource

import msgspec
from dynamo.llm import KvRouter, SelectionService, compute_block_hash_for_seq

ENGINES = 4
BLOCKS = 800
MAX_PROMPT_BLOCKS = 40

Costs = dict[int, float]  # of each engine


@dataclass
class Compared:
    """What one prompt would cost at each engine, and the choice."""

    ours: Costs
    theirs: Costs
    chosen: int


class Peer(Protocol):
    async def costs(self, tokens: list[int]) -> Costs: ...
    async def route(self, request_id: str, tokens: list[int]) -> int: ...
    async def first_token(self, request_id: str) -> None: ...
    async def finish(self, request_id: str) -> None: ...


@dataclass
class KvRouterPeer:
    """Its engines are the ranks, from 0, of one instance."""

    router: KvRouter

    async def costs(self, tokens: list[int]) -> Costs:
        loads: Any = await self.router.get_potential_loads(tokens)
        return {load["dp_rank"] + 1: cost(load) for load in loads}

    async def route(self, request_id: str, tokens: list[int]) -> int:
        _, rank, _ = await self.router.best_worker(tokens, request_id=request_id)
        return rank + 1

    async def first_token(self, request_id: str) -> None:
        await self.router.mark_prefill_complete(request_id)

    async def finish(self, request_id: str) -> None:
        await self.router.free(request_id)


@dataclass
class SelectionServicePeer:
    service: SelectionService

    async def costs(self, tokens: list[int]) -> Costs:
        request = {"model_name": MODEL, "token_ids": tokens}
        loads: Any = await self.service.potential_loads(request)
        return {load["worker_id"]: cost(load) for load in loads}

    async def route(self, request_id: str, tokens: list[int]) -> int:
        request = {"model_name": MODEL, "token_ids": tokens, "selection_id": request_id}
        found: Any = await self.service.select_and_reserve(request)
        return int(found["worker_id"])

    async def first_token(self, request_id: str) -> None:
        await self.service.prefill_complete(request_id)

    async def finish(self, request_id: str) -> None:
        await self.service.free_reservation(request_id)

    async def draw(self, tokens: list[int]) -> int:
        found: Any = await self.service.select({"model_name": MODEL, "token_ids": tokens})
        return int(found["worker_id"])


def cost(load: dict[str, int]) -> float:
    """With the default weights; the router logs the same number as `logit`."""
    return load["potential_prefill_tokens"] / BLOCK_SIZE + load["potential_decode_blocks"]


@asynccontextmanager
async def kv_router_peer(fleet: Fleet) -> AsyncIterator[Peer]:
    async with kv_router(fleet) as router:
        yield KvRouterPeer(router)


@asynccontextmanager
async def selection_service_peer(fleet: Fleet) -> AsyncIterator[SelectionServicePeer]:
    async with selection_service(fleet) as service:
        yield SelectionServicePeer(service)


class Ours:
    """The engines as our router knows them, for `policies.dynamo`."""

    def __init__(self, fleet: Fleet) -> None:
        self.active = ActiveRequests()
        self._index = KvIndex()
        decode = msgspec.msgpack.Decoder(KvEventBatch).decode
        for instance, message in fleet.messages:
            self._index.apply(instance, decode(message).events)
        self._workers = [
            Worker(i, KvSource(EngineInfo(MODEL, "", 9, BLOCK_SIZE, 9, i), "", "", ""))
            for i in fleet.instances
        ]

    def snapshot(self, tokens: list[int], seed: int = 0) -> Snapshot:
        hashes = compute_block_hash_for_seq(tokens, BLOCK_SIZE)
        cached = self._index.overlaps(hashes)
        views = [
            worker.view(
                prefix_names(hashes),
                cached.get(worker.instance, 0),
                prompt_tokens=len(tokens),
                cached_blocks=0,
                load=self.active.load(worker.instance),
                now=0.0,
            )
            for worker in self._workers
        ]
        return Snapshot(RequestView(len(tokens)), tuple(views), 0.0, seed)

    def costs(self, tokens: list[int]) -> Costs:
        snapshot = self.snapshot(tokens)
        scores = dynamo.policy(snapshot)
        return {
            view.instance_id: -sum(terms.values())
            for view, terms in zip(snapshot.workers, scores, strict=True)
        }

    def route(self, request_id: str, tokens: list[int], instance: int) -> None:
        (view,) = (v for v in self.snapshot(tokens).workers if v.instance_id == instance)
        self.active.add(
            request_id,
            instance,
            prefill_tokens=round(view.new_tokens),
            names=prefix_names(compute_block_hash_for_seq(tokens, BLOCK_SIZE)),
            own_blocks=7,
            now=0.0,
        )


def prompt(rng: random.Random, known: list[Cached], asked: list[list[int]]) -> list[int]:
    """Something new after a part of what is cached, of what was asked before, or of nothing."""
    beginning: list[int] = rng.choice([[], rng.choice(known).token_ids, *asked[-2:]])
    beginning = beginning[: rng.randint(0, MAX_PROMPT_BLOCKS) * BLOCK_SIZE]
    tokens = beginning + new_tokens(rng, MAX_PROMPT_BLOCKS)
    return tokens[: rng.randint(max(len(beginning), 1), len(tokens))]


async def live(
    open_peer: Callable[[Fleet], AbstractAsyncContextManager[Peer]], seed: int, requests: int
) -> list[Compared]:
    """Requests come, get their first tokens and end in no order; each goes where the peer says."""
    fleet = Fleet(ENGINES, BLOCKS, seed)
    rng = random.Random(seed)
    ours = Ours(fleet)
    compared: list[Compared] = []
    asked: list[list[int]] = []
    running: list[str] = []
    async with open_peer(fleet) as peer:
        for number in range(requests):
            tokens = prompt(rng, fleet.sample, asked)
            asked.append(tokens)
            costs, theirs = ours.costs(tokens), await peer.costs(tokens)
            chosen = await peer.route(f"r{number}", tokens)
            ours.route(f"r{number}", tokens, chosen)
            compared.append(Compared(costs, theirs, chosen))
            running.append(f"r{number}")
            for request_id in rng.sample(running, min(len(running), rng.randint(0, 3))):
                if rng.random() < 0.5:
                    await peer.first_token(request_id)
                    ours.active.first_token(request_id, 0.0)
                else:
                    await peer.finish(request_id)
                    ours.active.finish(request_id)
                    running.remove(request_id)
    return compared


def live_with_kv_router(seed: int, requests: int) -> list[Compared]:
    return asyncio.run(live(kv_router_peer, seed, requests))


def live_with_selection_service(seed: int, requests: int) -> list[Compared]:
    return asyncio.run(live(selection_service_peer, seed, requests))


def draws(count: int) -> tuple[Costs, list[int]]:
    """What a prompt costs at each engine, and which engines a `SelectionService` draws for it."""

    async def draw() -> tuple[Costs, list[int]]:
        fleet = Fleet(ENGINES, BLOCKS, seed=0)
        tokens = fleet.sample[0].token_ids
        async with selection_service_peer(fleet) as peer:
            for number in range(5):
                await peer.route(f"r{number}", new_tokens(random.Random(number), 10 * number + 1))
            costs = await peer.costs(tokens)
            return costs, [await peer.draw(tokens) for _ in range(count)]

    return asyncio.run(draw())
