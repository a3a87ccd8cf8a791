"""Replays in virtual time: nothing is lost in them, and a seed gives the same again."""

import random
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.report import GuardError
from benchmarks.trace import TraceRequest
from benchmarks.trace_engine import EngineSettings, Running, TraceEngine
from benchmarks.trace_measure import Figures, Run, bound, measure
from benchmarks.trace_replay import METRICS_INTERVAL_S, Replay, SelectorRouter, arrivals, replay
from benchmarks.trace_workloads import WORKLOADS, workload
from common.protocol import EngineMetrics

import pytest

ENGINES = 3


class Chance:
    """Sends requests anywhere, and checks all that it hears against the engines."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.engines: Sequence[TraceEngine] = ()
        self.heard: dict[int, set[int]] = {}
        self.running: dict[str, str] = {}
        self.ended = 0
        self.metrics_at: dict[int, float] = {}
        self.reported: dict[int, EngineMetrics] = {}

    def choose(self, running: Running, engines: Sequence[TraceEngine], now: float) -> int:
        self.engines = engines
        for engine in engines:
            self.check(engine)
            assert self.metrics_at[engine.instance] <= now
            assert self.metrics_at[engine.instance] > now - METRICS_INTERVAL_S - 1e-6
        self.running[running.id] = "prefill"
        return self._rng.randrange(len(engines))

    def metrics(self, engine: TraceEngine, now: float) -> None:
        assert now >= self.metrics_at.get(engine.instance, 0.0)
        self.metrics_at[engine.instance] = now
        assert engine.metrics.used_blocks >= 0

    def first_token(self, running: Running, now: float) -> None:
        assert self.running[running.id] == "prefill"
        self.running[running.id] = "decode"
        self.check_all()

    def finished(self, running: Running, now: float) -> None:
        assert self.running.pop(running.id) == "decode"
        self.ended += 1
        self.check_all()

    def stored(self, instance: int, request: TraceRequest, first: int) -> None:
        heard = self.heard.setdefault(instance, set())
        new = request.full_blocks[first:]
        assert new
        assert heard.isdisjoint(new)
        assert heard.issuperset(request.full_blocks[:first])
        heard.update(new)

    def removed(self, instance: int, blocks: list[int]) -> None:
        assert self.heard[instance].issuperset(blocks)
        self.heard[instance].difference_update(blocks)

    def check_all(self) -> None:
        for engine in self.engines:
            self.check(engine)

    def check(self, engine: TraceEngine) -> None:
        cache = engine.cache
        cached = {*cache._held, *cache._evictable}
        assert cached == self.heard.get(engine.instance, set())
        assert cache.own >= 0
        assert len(cached) + cache.own <= cache.blocks
        assert 0 <= cache.used <= cache.blocks


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_and_what_is_heard_is_what_is_cached(name: str, seed: int) -> None:
    trace = workload(name, seed, 200, 20.0)
    requests = arrivals(trace, 1.0, seed)
    router = Chance(seed)
    settings = EngineSettings(cache_blocks=220, max_running=9)
    result = replay(requests, ENGINES, settings, lambda: router)
    assert router.ended == len(result.routed) == len(trace)
    assert router.running == {}
    for running in requests:
        assert running.started is not None
        assert running.first_token is not None
        assert running.finished is not None
        assert running.arrived <= running.started < running.first_token <= running.finished
        assert 0 <= running.cached_tokens < running.request.input_length
    computed = sum(r.request.input_length - r.cached_tokens for r in requests)
    assert sum(engine.prefilled_tokens for engine in result.engines) == computed
    for engine in result.engines:
        router.check(engine)
        assert (engine.metrics.running, engine.metrics.waiting) == (0, 0)
        assert (engine.cache.used, engine.cache.own) == (0, 0)
        assert not engine._expected_blocks
        assert (engine._expected_tokens, engine._kv_tokens) == (0, 0)
        assert 0 < engine.busy_s <= result.end
    evicted = any(len(router.heard[i]) < len(all_blocks(result, i)) for i in range(ENGINES))
    assert evicted, "the caches should have been too small for this to show something"


def all_blocks(result: Replay, instance: int) -> set[int]:
    routed = zip(result.requests, result.routed, strict=True)
    return {
        block
        for running, chosen in routed
        if chosen == instance
        for block in running.request.full_blocks
    }


def test_a_request_that_never_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TraceEngine, "_admit", lambda engine: None)
    requests = arrivals(workload("chats", 0, 5, 5.0), 1.0, 0)
    with pytest.raises(RuntimeError, match="5 of 5 requests did not end"):
        replay(requests, 2, EngineSettings(), lambda: Chance(0))


def test_arrivals_keep_the_pace_of_the_trace_but_for_a_second() -> None:
    trace = workload("mixed", 0, 100, 100.0)
    for running in arrivals(trace, 2.0, 7):
        assert abs(running.arrived * 2 - running.request.timestamp / 1e3) <= 1.0
    again, other = arrivals(trace, 2.0, 7), arrivals(trace, 2.0, 8)
    times = [running.arrived for running in again]
    assert times == sorted(times) == [r.arrived for r in arrivals(trace, 2.0, 7)]
    assert times != [running.arrived for running in other]


@pytest.mark.parametrize("policy", ["earliest_start", "dynamo", "random", "oracle", "bound"])
def test_a_seed_gives_the_same_figures(policy: str) -> None:
    trace = workload("chats", 0, 150, 20.0)

    def measured(seed: int) -> Figures:
        return replace(measure(trace, Run(policy, 1.0, 200, seed, ENGINES)), wall_s=0.0)

    assert measured(1) == measured(1)
    if policy != "bound":
        assert measured(1) != measured(2)


def test_the_oracle_and_ours_do_better_than_chance_and_nothing_beats_the_bound() -> None:
    trace = workload("chats", 0, 400, 60.0)
    found = {
        policy: measure(trace, Run(policy, 1.0, 400, 1, ENGINES))
        for policy in ("earliest_start", "random", "oracle", "bound")
    }
    assert {figures.requests for figures in found.values()} == {400}
    for policy in ("earliest_start", "oracle"):
        assert found[policy].ttft_mean_ms < found["random"].ttft_mean_ms
        assert found[policy].hit_rate > found["random"].hit_rate
    for policy in ("earliest_start", "random", "oracle"):
        assert found[policy].ttft_mean_ms > found["bound"].ttft_mean_ms
        assert found[policy].hit_rate <= found["bound"].hit_rate
        assert found[policy].imbalance >= 1


def test_the_bound_has_every_full_block_that_it_saw_before() -> None:
    """4000 tokens a second, and a step of 15 ms for each prompt."""
    trace = [TraceRequest(0, 1100, 2, [1, 2, 3]), TraceRequest(5000, 1124, 2, [1, 2, 4])]
    found = bound([Running(str(n), r, n * 5.0) for n, r in enumerate(trace)], EngineSettings())
    assert found.hit_rate == pytest.approx(1024 / 2224)
    assert found.ttft_p50_ms == pytest.approx(1100 / 4 + 15)  # the higher one of two
    assert found.ttft_mean_ms == pytest.approx((1200 / 4) / 2 + 15)


def test_a_router_that_hears_nothing_gives_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelectorRouter, "_apply", lambda *_: None)
    with pytest.raises(GuardError, match="the router heard of none"):
        measure(workload("chats", 0, 100, 20.0), Run("kv", 1.0, 400, 1, 2))


def test_load_is_also_what_was_computed() -> None:
    """Two engines that were at work all the time, of which one computed three times as much."""
    engines = [TraceEngine(i, EngineSettings(), Chance(0)) for i in range(2)]
    for engine, tokens in zip(engines, (1000.0, 3000.0), strict=True):
        engine.busy_s, engine.prefilled_tokens = 10.0, tokens
    assert Replay([], engines).imbalance == 1.5
    engines[0].busy_s = 90.0
    assert Replay([], engines).imbalance == pytest.approx(1.8)
