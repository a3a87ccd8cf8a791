"""Dynamo's own routers in a replay: they hear all events, and decide like our form of their cost.

They run in a process of their own, as a test run has a runtime already.
"""

import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from benchmarks import trace_peers
from benchmarks.report import GuardError
from benchmarks.router_peers import PeerUnavailableError
from benchmarks.trace import TraceRequest
from benchmarks.trace_engine import EngineSettings, Running
from benchmarks.trace_measure import Run, measure
from benchmarks.trace_peers import BLOCK_SIZE, PeerRouter, peer_router, prompt_of
from benchmarks.trace_replay import arrivals, replay
from benchmarks.trace_workloads import workload
from common.kv import BlockRemoved, BlockStored, KvEvent

import pytest

T = TypeVar("T")
ENGINES = 4
REQUESTS = 400
SETTINGS = EngineSettings(cache_blocks=300)


def in_process(work: Callable[..., T], *arguments: Any) -> T:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def trace() -> list[TraceRequest]:
    return workload("chats", 3, REQUESTS, 50.0)


def replayed_twice(name: str) -> list[tuple[float, float, int, set[int]]]:
    """Hit rate, mean TTFT, events applied and the engines chosen; two replays in one process."""
    found = []
    for _ in range(2):
        with peer_router(name, ENGINES, SETTINGS) as router:
            result = replay(arrivals(trace(), 1.0, 1), ENGINES, SETTINGS, lambda: router)
        ttft = sum(result.ttfts) / len(result.ttfts)
        found.append((result.hit_rate, ttft, router.events_applied, set(result.routed)))
    return found


@pytest.mark.parametrize("name", trace_peers.PEERS)
async def test_they_decide_like_our_form_of_their_cost(
    name: str, servers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in servers.items():
        monkeypatch.setenv(key, value)
    found = await asyncio.to_thread(in_process, replayed_twice, name)
    ours = measure(trace(), Run("dynamo", 1.0, SETTINGS.cache_blocks, 1, ENGINES))
    chance = measure(trace(), Run("random", 1.0, SETTINGS.cache_blocks, 1, ENGINES))
    assert ours.hit_rate > chance.hit_rate + 0.1, "else nothing is shown by what follows"
    for hit_rate, ttft_s, events, engines in found:
        assert hit_rate == pytest.approx(ours.hit_rate, abs=0.06)
        assert ttft_s * 1e3 == pytest.approx(ours.ttft_mean_ms, rel=0.25)
        assert events > REQUESTS
        assert engines == set(range(ENGINES))


def opened_without_nats() -> str:
    try:
        with peer_router("KvRouter", 2, SETTINGS):
            return "it was opened"
    except PeerUnavailableError as error:
        return str(error)


async def test_a_peer_that_cannot_be_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", "nats://127.0.0.1:1")
    reason = await asyncio.to_thread(in_process, opened_without_nats)
    assert "NATS_SERVER=nats://127.0.0.1:1" in reason


class SlowPeer:
    """Has what was published only when it was asked twice, in any case if it is not `deaf`."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.deaf = deaf
        self.told: list[str] = []
        self.cached: dict[int, set[int]] = {1: set(), 2: set()}
        self._published: list[tuple[int, KvEvent]] = []
        self._asked = 0

    async def choose(self, request_id: str, tokens: list[int]) -> int:
        self.told.append(f"choose {request_id}")
        return 2

    async def first_token(self, request_id: str) -> None:
        self.told.append(f"first token {request_id}")

    async def finished(self, request_id: str) -> None:
        self.told.append(f"finished {request_id}")

    async def publish(self, instance: int, events: list[KvEvent]) -> None:
        self._published += [(instance, event) for event in events]

    async def who_has(self, tokens: list[int]) -> set[int]:
        self._asked += 1
        if self._asked % 2 == 0 and not self.deaf:
            self.apply()
        return {i for i, cached in self.cached.items() if tokens[0] in cached}

    def apply(self) -> None:
        for instance, event in self._published:
            if isinstance(event, BlockStored):
                self.cached[instance] |= set(event.token_ids[::BLOCK_SIZE])
            elif isinstance(event, BlockRemoved):
                removed = {2**32 + name if name < 0 else name for name in event.block_hashes}
                self.cached[instance] -= removed
        self._published.clear()


def asked(blocks: list[int], tokens: int, request_id: str = "a") -> Running:
    return Running(request_id, TraceRequest(0.0, tokens, 1, blocks), 0.0)


def test_a_decision_is_made_with_all_that_was_heard_before() -> None:
    peer = SlowPeer()
    first = asked([5, 6, 7], 1500)
    with asyncio.Runner() as runner:
        router = PeerRouter(runner, peer)
        assert router.choose(first, (), 0.0) == 1
        router.stored(1, first.request, 0)
        router.first_token(first, 1.0)
        router.stored(0, TraceRequest(0.0, 600, 1, [8, 9]), 0)
        router.removed(1, [6])
        router.finished(first, 2.0)
        assert router.choose(asked([5], 100, "b"), (), 3.0) == 1
    assert peer.told == ["choose a", "first token a", "finished a", "choose b"]
    assert router.events_applied == 3
    peer.apply()
    assert peer.cached == {1: {8}, 2: {5}}  # what marked the events is gone, too


def test_a_peer_that_does_not_get_the_events_gives_no_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_peers, "ANSWER_TIMEOUT_S", 0.1)
    request = asked([5, 6], 600)
    with asyncio.Runner() as runner:
        router = PeerRouter(runner, SlowPeer(deaf=True))
        router.stored(1, request.request, 0)
        with pytest.raises(GuardError, match="no decision within"):
            router.choose(request, (), 1.0)


def test_prompts_keep_their_proportions() -> None:
    """512 tokens are 32; what is left of a block never makes a full one."""
    assert prompt_of(asked([7, 8, 9], 1024 + 511).request) == [7] * 32 + [8] * 32 + [9] * 31
    assert prompt_of(asked([7, 8], 1024).request) == [7] * 32 + [8] * 32
    assert prompt_of(asked([7], 32).request) == [7] * 2
    assert len(prompt_of(asked([7], 1).request)) == 1
