"""The engine of the traces against the simulated engine that serves, in its own virtual time."""

import asyncio
import selectors
from collections.abc import Sequence
from typing import Any

from benchmarks.trace import BLOCK_SIZE, TraceRequest
from benchmarks.trace_engine import EngineSettings, Running, TraceEngine
from benchmarks.trace_workloads import workload
from common.engines.simulated import SimulatedEngine, SimulatedSettings
from common.protocol import GenerateRequest, SamplingParams
from tests.benchmarks.test_trace_engine import Heard
from tests.common.engines.engine_helpers import FakeContext

import pytest

SETTINGS = EngineSettings(cache_blocks=400, decode_ms_per_1k_kv_tokens=0.0, max_running=64)


class Skipping(selectors.DefaultSelector):
    """Instead of waiting, it lets time pass."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(timeout and 0)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._skipping = Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


Times = list[tuple[float, float]]  # of each request: until its first token, until its end


async def served(trace: Sequence[TraceRequest]) -> tuple[Times, int]:
    """What the simulated engine makes of it, and how many prompt tokens it reuses."""
    settings = SimulatedSettings(
        context_length=200_000,
        cache_tokens=SETTINGS.cache_blocks * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_running=SETTINGS.max_running,
        prefill_chunk=SETTINGS.prefill_chunk,
        prefill_tokens_per_s=SETTINGS.prefill_tokens_per_s,
        decode_base_ms=SETTINGS.decode_base_ms,
        decode_ms_per_request=SETTINGS.decode_ms_per_request,
    )
    engine = await SimulatedEngine.start(settings)
    loop = asyncio.get_running_loop()

    async def ask(number: int, request: TraceRequest) -> tuple[float, float]:
        arrived = request.timestamp / 1e3
        await asyncio.sleep(arrived - loop.time())
        tokens = [10 + block for block in request.full_blocks for _ in range(BLOCK_SIZE)]
        tokens += [10**6 + number] * (request.input_length - len(tokens))
        sampling = SamplingParams(max_tokens=request.output_length, ignore_eos=True)
        first = 0.0
        async for item in engine.generate(GenerateRequest(tokens, sampling), FakeContext()):
            if item.token_ids:
                first = first or loop.time()
        return first - arrived, loop.time() - arrived

    try:
        asked = (ask(number, request) for number, request in enumerate(trace))
        times = await asyncio.gather(*asked)
        return times, engine.metrics().cached_tokens
    finally:
        await engine.close()


def modelled(trace: Sequence[TraceRequest]) -> tuple[Times, int]:
    requests = [Running(str(n), r, r.timestamp / 1e3) for n, r in enumerate(trace)]
    engine = TraceEngine(0, SETTINGS, Heard())
    waiting = list(requests)
    while waiting or engine.next_event() < float("inf"):
        event = engine.next_event()
        if waiting and waiting[0].arrived < event:
            engine.advance(waiting[0].arrived)
            engine.submit(waiting.pop(0))
        else:
            engine.advance(event)
            engine.happen()
    times = []
    for running in requests:
        assert running.first_token is not None
        assert running.finished is not None
        times.append((running.first_token - running.arrived, running.finished - running.arrived))
    return times, sum(running.cached_tokens for running in requests)


@pytest.mark.parametrize(
    ("name", "seconds"), [("chats", 60.0), ("documents", 150.0), ("mixed", 150.0)]
)
def test_times_and_reuse_are_those_of_the_simulated_engine(name: str, seconds: float) -> None:
    """A request may come a step earlier or later, and so take its turn after another one."""
    trace = workload(name, 1, 60, seconds)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        real, real_cached = runner.run(served(trace))
    model, model_cached = modelled(trace)
    assert model_cached == pytest.approx(real_cached, rel=0.03)
    for column in (0, 1):
        pairs = [(a[column], b[column]) for a, b in zip(real, model, strict=True)]
        assert sum(b for _, b in pairs) == pytest.approx(sum(a for a, _ in pairs), rel=0.06)
        differences = sorted(abs(b - a) / a for a, b in pairs)
        assert differences[len(pairs) // 2] < 0.03
        assert differences[len(pairs) * 9 // 10] < 0.2
    waited = sum(1 for ttft, _ in real if ttft > 1.0)
    assert waited > 5, "the engine should have had something to do"
