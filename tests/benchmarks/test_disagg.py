"""`benchmarks.disagg`: equal requests for all modes, honest gaps, and no ratio of a faulty run."""

from io import FileIO
from pathlib import Path
from typing import Any

from benchmarks import disagg, disagg_run, disagg_threshold
from benchmarks.disagg_engine import Recorder
from benchmarks.disagg_engines import REAL, SIMULATED, Engines
from benchmarks.disagg_pipeline import Mode
from benchmarks.disagg_records import (
    CAUSES,
    PARTS,
    EngineRecords,
    Gap,
    cause,
    gaps_of,
    handover,
    read_records,
    slowdown,
    step_cost,
)
from benchmarks.disagg_workload import Arrival, Kind, arrivals
from benchmarks.sse_load import Answer
from chapter3.disaggregation import DEFAULT_MIN_TOKENS
from common.engines.simulated import SimulatedEngine, SimulatedSettings
from common.model_files import DEFAULT_MODEL
from common.protocol import GenerateRequest, SamplingParams
from common.text import TextModel, load_text_model
from tests.common.engines.engine_helpers import FakeContext, Result
from tests.common.engines.handover_helpers import Peer, a_prompt, compute, decode_request

import pytest


@pytest.fixture(scope="module")
def text() -> TextModel:
    return load_text_model(DEFAULT_MODEL)


def test_a_seed_gives_the_same_requests_at_the_same_times(text: TextModel) -> None:
    first, again, other = (arrivals(text, seed, 20.0, REAL.shapes) for seed in (1, 1, 2))
    assert first == again
    assert [a.at_s for a in first] != [a.at_s for a in other]
    assert [a.at_s for a in first] == sorted(a.at_s for a in first)


@pytest.mark.parametrize("engines", [REAL, SIMULATED])
def test_all_seeds_have_the_same_load(text: TextModel, engines: Engines) -> None:
    runs = [arrivals(text, seed, 20.0, engines.shapes) for seed in (1, 2)]
    for kind, shape in engines.shapes.items():
        some = [[a for a in run if a.kind == kind] for run in runs]
        assert [len(of_seed) for of_seed in some] == [round(20 * shape.per_s)] * 2
        totals = [sum(a.prompt_tokens for a in of_seed) for of_seed in some]
        assert totals[0] == totals[1]


def test_only_long_prompts_are_above_the_threshold_and_none_are_alike(text: TextModel) -> None:
    found = arrivals(text, 1, 60.0, REAL.shapes)
    assert {a.prompt_tokens >= DEFAULT_MIN_TOKENS for a in found if a.kind == "long"} == {True}
    assert {a.prompt_tokens >= DEFAULT_MIN_TOKENS for a in found if a.kind == "chat"} == {False}
    assert all(len(a.body["prompt"]) == a.prompt_tokens for a in found)
    assert len({tuple(a.body["prompt"][:16]) for a in found}) == len(found)


def test_an_event_ends_one_gap_however_many_tokens_it_has() -> None:
    assert [gap.ms for gap in gaps_of("r", [1.0, 1.5, 1.75])] == [500.0, 250.0]
    assert gaps_of("r", [1.0]) == []


def step(begin: float, end: float, *sampled: str, **others: Any) -> dict[str, Any]:
    known = {"decodes": len(sampled), "prefill": 0, "imports": 0, "imported": []}
    return {"begin": begin, "end": end, "sampled": list(sampled), "sampled_at": end, **known} | (
        others
    )


def decoding(*steps: dict[str, Any]) -> EngineRecords:
    """An engine that answers `r`."""
    return EngineRecords(list(steps), {"r": {"prefill_only": False, "at": 0.0}})


@pytest.mark.parametrize(
    ("between", "gap", "remote", "expected"),
    [
        ([], Gap("r", 0, 0.1, 0.9), {"r"}, "handover"),
        ([step(0.1, 0.9, "r", prefill=64)], Gap("r", 0, 0.11, 0.91), set(), "prefill"),
        ([step(0.1, 0.9, "r", imports=32)], Gap("r", 0, 0.11, 0.91), set(), "import"),
        ([step(0.1, 0.9, "r")], Gap("r", 0, 0.11, 0.91), set(), "decode"),
        ([step(0.1, 0.12, "r")], Gap("r", 0, 0.11, 0.91), set(), "relay"),
        # A step for others only, between two of its own.
        ([step(0.1, 0.8, "x", prefill=9), step(0.8, 0.9, "r")], Gap("r", 0, 0.11, 0.91), set(),
         "prefill"),
    ],
)  # fmt: skip
def test_a_long_gap_is_put_down_to_what_the_engine_did(
    between: list[dict[str, Any]], gap: Gap, remote: set[str], expected: str
) -> None:
    engine = decoding(step(0.0, 0.1, "r"), *between, step(2.0, 2.1, "r"))
    elsewhere = EngineRecords([step(0.1, 0.9, "y", prefill=512)])
    own = sum("r" in one["sampled"] for one in engine.steps)
    assert cause(gap, own, [elsewhere, engine], remote) == expected
    assert expected in CAUSES


def test_steps_are_compared_with_steps_of_as_many_requests() -> None:
    """And those that computed prompts, or ran half beside the other engine, do not count."""
    steps = [step(t, t + 0.1, "a") for t in range(5)]
    steps += [step(t, t + 0.15, "a") for t in range(10, 15)]
    steps += [step(t, t + 0.9, "a", "b") for t in range(20, 30)]
    steps += [step(t, t + 0.9, "a", prefill=64) for t in range(30, 35)]
    steps += [step(t, t + 0.9, "a") for t in range(40, 45)]
    other = EngineRecords([step(10.0, 15.0), *(step(t + 0.45, t + 1) for t in range(40, 45))])
    assert slowdown(EngineRecords(steps), other) == pytest.approx(1.5)
    assert slowdown(EngineRecords(steps[:7]), other) == 0.0


def test_the_cost_of_a_step_is_told_from_what_it_computes() -> None:
    found = [
        step(0.0, (2 + 3 * decodes + 0.5 * prompt) / 1e3, prefill=prompt, decodes=decodes)
        for decodes, prompt in ((1, 0), (4, 0), (0, 64), (3, 8), (2, 16))
    ]
    assert step_cost([*found, step(0.0, 9.0, "r", imports=1)]) == pytest.approx(
        {"step_ms": 2.0, "step_decode_ms": 3.0, "step_prompt_token_ms": 0.5}
    )


def test_a_handover_is_taken_apart_without_remainder() -> None:
    prefill = EngineRecords([step(0.0, 1.1, "r", sampled_at=1.0)])
    decode = EngineRecords(
        [step(1.5, 1.9, "r", imported=["r"], imports=3), step(1.9, 2.5, "r")],
        {"r": {"at": 1.2}},
        {"r": {"at": 1.4}},
    )
    parts = handover("r", prefill, decode, 2.0)
    assert parts is not None
    assert parts == pytest.approx(dict.fromkeys(PARTS, 100.0) | {"fetch": 200.0, "step": 400.0})
    assert handover("other", prefill, decode, 2.0) is None


def row(name: str = disagg.AGGREGATED, **figures: float) -> dict[str, Any]:
    known = {"itl_p99_ms": 100.0, "throughput_tokens_per_s": 50.0, "ttft_p95_ms": 1000.0}
    known |= {"chat_itl_p99_ms": 90.0, "busy_s": 20.0, "cores_others": 0.0}
    known |= {"busy_engine0": 0.6, "busy_engine1": 0.5}
    known |= {"in_flight_first_half": 5.0, "in_flight_second_half": 6.0}
    return {"name": name, "faults": [], "tokens": [7], **known, **figures}


def test_the_best_chunk_size_may_not_cost_throughput_or_ttft() -> None:
    sweep = [
        row(itl_p99_ms=50.0, throughput_tokens_per_s=44.0),
        row(itl_p99_ms=60.0, ttft_p95_ms=2001.0),
        row(itl_p99_ms=70.0, throughput_tokens_per_s=45.0, ttft_p95_ms=2000.0),
        row(),
        row(disagg.CONDITIONAL, itl_p99_ms=1.0),
    ]
    assert disagg.best(sweep, disagg.AGGREGATED) is sweep[2]


def test_ratios_are_to_the_aggregated_engines_and_tell_whether_the_bar_is_met() -> None:
    chosen = [
        row(),
        row(disagg.DISAGGREGATED, itl_p99_ms=50.0, throughput_tokens_per_s=45.0),
        row(disagg.CONDITIONAL, itl_p99_ms=50.0, throughput_tokens_per_s=44.0),
    ]
    assert disagg.faults(chosen) == []
    found = disagg.ratios(chosen)
    assert found[disagg.DISAGGREGATED]["itl_p99_ms"] == 0.5
    assert found[disagg.DISAGGREGATED]["bar_met"]
    assert not found[disagg.CONDITIONAL]["bar_met"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"faults": ["2 transfers failed"]}, "2 transfers failed"),
        ({"tokens": [8]}, "different numbers of tokens"),
        ({"busy_engine1": 0.96, "in_flight_second_half": 7.6}, "too much load"),
        ({"busy_engine0": 0.1, "busy_engine1": 0.2}, "too little"),
        ({"cores_others": 0.5}, "not a quiet machine"),
    ],
)
def test_what_cannot_be_compared_has_a_fault(wrong: dict[str, Any], message: str) -> None:
    (fault,) = disagg.faults([row(), row(disagg.DISAGGREGATED, **wrong)])
    assert message in fault


def test_an_engine_that_always_generates_has_not_too_much_to_do() -> None:
    assert disagg.faults([row(busy_engine1=1.0, in_flight_second_half=7.4)]) == []


@pytest.mark.parametrize(
    ("limit", "remote", "faults"),
    [
        (None, set(), 0),
        (None, {"long"}, 1),
        (0, {"long", "chat"}, 0),
        (0, {"long"}, 1),
        (64, {"long"}, 0),
        (64, {"long", "chat"}, 1),
        (64, set(), 1),
    ],
)
def test_prompts_are_computed_where_the_mode_says(
    limit: int | None, remote: set[str], faults: int
) -> None:
    prompts: list[tuple[Kind, int]] = [("long", 300), ("chat", 20)]
    asked = [
        disagg_run.Asked(
            Arrival(0.0, kind, {}, tokens, 5), 0.0, Answer(1, 2, 5, 5, tokens, request_id=kind), []
        )
        for kind, tokens in prompts
    ]
    assert len(disagg_run.prompt_faults(Mode("m", 8, limit), asked, remote)) == faults


def test_a_remote_prefill_pays_from_where_it_always_does() -> None:
    waiting = {16: (10, 20), 64: (30, 20), 128: (40, 50), 256: (60, 50), 512: (80, 70)}
    rows: list[dict[str, Any]] = [
        {"prompt_tokens": tokens, "way": way, "chats": 4, "waiting_ms": ms}
        for tokens, pair in waiting.items()
        for way, ms in zip(("local", "remote"), pair, strict=True)
    ]
    assert disagg_threshold.pays_from(rows, 4) == 256
    assert disagg_threshold.pays_from([r for r in rows if r["prompt_tokens"] < 200], 4) is None


async def test_a_real_engine_s_steps_and_transfers_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder wraps methods by name: it must notice when one of them has another."""
    path = tmp_path / "records"
    prompt, sampling = a_prompt(1, 40), {"temperature": 0.0, "ignore_eos": True, "max_tokens": 4}
    with FileIO(path, "a") as file:
        recorder = Recorder(file)
        for owner, name, wrapper in recorder.wrappers("llamacpp"):
            monkeypatch.setattr(owner, name, wrapper(getattr(owner, name)))
        async with Peer.start() as peer:
            first = await compute(peer, prompt, **sampling)
            await peer.engine.clear_cache()
            await peer.run(decode_request(prompt, first, first.kv, **sampling))
            fetched = peer.fetched_bytes
    found = read_records(path, 0.0, float("inf"))
    assert [fetch["bytes"] for fetch in found.fetches] == [fetched]
    assert sum(s["prefill"] for s in found.steps) == len(prompt)
    assert sum(s["imports"] for s in found.steps) == 3  # blocks of 16, the last one in part
    assert sum(len(s["sampled"]) for s in found.steps) == sampling["max_tokens"]
    assert all(s["begin"] <= s["end"] for s in found.steps)
    assert sum(s.get("export_kv_s", 0.0) for s in found.steps) > 0
    assert sum(s.get("import_kv_s", 0.0) for s in found.steps) > 0
    assert (list(found.arrived), list(found.received)) == (["test"], ["test"])
    assert found.busy_s(0.0, float("inf")) > 0
    assert read_records(path, 0.0, 1.0) == EngineRecords()


async def test_a_simulated_engine_s_steps_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records"
    prompt, sampling = a_prompt(1, 40), SamplingParams(ignore_eos=True, max_tokens=4)
    with FileIO(path, "a") as file:
        for owner, name, wrapper in Recorder(file).wrappers("simulated"):
            monkeypatch.setattr(owner, name, wrapper(getattr(owner, name)))
        settings = SimulatedSettings(decode_base_ms=20, prefill_tokens_per_s=1000)
        engine = await SimulatedEngine.start(settings)
        try:
            asked = GenerateRequest(prompt, sampling, prefill_only=True)
            first = Result([item async for item in engine.generate(asked, FakeContext())])
            await engine.clear_cache()
            tokens = [*prompt, *first.token_ids]
            rest = GenerateRequest(tokens, sampling, 1, kv=first.items[-1].kv)
            assert [item async for item in engine.generate(rest, FakeContext())]
        finally:
            await engine.close()
    found = read_records(path, 0.0, float("inf"))
    assert sum(s["prefill"] for s in found.steps) == len(prompt)
    assert sum(len(s["sampled"]) for s in found.steps) == sampling.max_tokens
    assert sum(s["imports"] for s in found.steps) == 3  # blocks of 16, the last one in part
    assert min(s["end"] - s["begin"] for s in found.steps) >= 0.02
    assert found.received
