"""The account of one answer across the engines that make it."""

import sys
from typing import Any

from chapter3.migration import DEFAULT_MIGRATION_LIMIT, Progress, failure_in
from chapter3.processor import parse_args
from common.protocol import (
    EngineOutput,
    EngineTimings,
    ErrorInfo,
    GenerateRequest,
    SamplingParams,
)

import pytest

LOST = ErrorInfo("unavailable", "Stream ended before generation completed")


def progress(limit: int = 3, context_length: int = 100, **sampling: Any) -> Progress:
    answer = Progress([1, 2, 3], SamplingParams(**sampling), context_length, limit)
    answer.sent(10.0)
    return answer


def got(answer: Progress, *tokens: int, **fields: Any) -> EngineOutput:
    output = EngineOutput(list(tokens), **fields)
    answer.add(output, 12.0)
    return output


def survives(answer: Progress, failure: ErrorInfo = LOST, *, died: bool = True) -> bool:
    return answer.lose(failure, 13.0, died=died)


def test_the_next_engine_gets_the_prompt_and_all_that_is_there() -> None:
    answer = progress(max_tokens=10, min_tokens=7)
    assert answer.request() == GenerateRequest([1, 2, 3], answer.sampling)
    got(answer, 4)
    got(answer, 5, 6)
    assert answer.request() == GenerateRequest([1, 2, 3, 4, 5, 6], answer.sampling, generated=3)
    assert answer.tokens_left() == 7


def test_each_token_and_each_migration_counts_once() -> None:
    answer = progress()
    assert got(answer, 4, worker_id=0, cached_tokens=2).cached_tokens == 2
    assert survives(answer)
    assert answer.take_migrations() == 0, "nothing has come of it yet"
    again = got(answer, 5, worker_id=1, cached_tokens=3)
    assert (again.cached_tokens, again.worker_id, answer.worker_id) == (None, 1, 1)
    assert [answer.take_migrations(), answer.take_migrations()] == [1, 0]
    assert answer.tokens == [4, 5]


def test_before_the_first_token_nothing_migrates_but_another_engine_may_answer() -> None:
    answer = progress()
    assert survives(answer, ErrorInfo("internal", "out of memory"))
    assert got(answer, 4, cached_tokens=3).cached_tokens == 3
    assert answer.take_migrations() == 0


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit(limit: int) -> None:
    answer = progress(limit)
    for token in range(limit):
        got(answer, token)
        assert survives(answer)
    got(answer, 99)
    assert not survives(answer)


def test_a_request_that_kills_three_engines_at_one_token_gets_no_fourth() -> None:
    answer = progress(limit=9)
    got(answer, 4)
    assert survives(answer)
    assert survives(answer)
    assert not survives(answer)


def test_deaths_with_progress_between_them_are_chance() -> None:
    answer = progress(limit=9)
    for token in range(3):
        got(answer, token)
        assert survives(answer)
        assert survives(answer)


def test_before_the_first_token_the_second_death_is_the_last() -> None:
    answer = progress(limit=9)
    assert survives(answer)
    assert not survives(answer)


def test_engines_that_leave_or_refuse_are_not_killed_by_the_request() -> None:
    answer = progress()
    got(answer, 4)
    assert survives(answer, ErrorInfo("unavailable", "shut down"), died=False)
    assert survives(answer, ErrorInfo("overloaded", "full"), died=False)
    assert survives(answer)
    assert answer.die(), "the second death"
    assert not survives(answer, ErrorInfo("overloaded", "full"), died=False), "the limit"


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        ("unavailable", 0, True),
        ("unavailable", 1, True),
        ("internal", 1, True),
        ("overloaded", 0, False),
        ("overloaded", 1, True),
        ("invalid_request", 0, False),
        ("invalid_request", 1, False),
        ("too_large", 1, False),
        ("conflict", 1, False),
    ],
)
def test_what_another_engine_may_help_against(kind: Any, tokens: int, expected: bool) -> None:
    answer = progress()
    got(answer, *range(tokens))
    assert survives(answer, ErrorInfo(kind, ""), died=False) is expected


def test_a_finished_answer_survives_nothing() -> None:
    answer = progress()
    got(answer, 4, finish_reason="stop")
    assert not survives(answer)


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [
        ({"max_tokens": 3}, [4, 5, 6], "length"),
        ({"max_tokens": 3}, [4, 5], None),
        ({}, list(range(17)), "length"),  # the context is full
        ({}, list(range(16)), None),
        ({"stop_token_ids": [6]}, [4, 5, 6], "stop"),
        ({"stop_token_ids": [5]}, [4, 5, 6], None),
        ({"stop_token_ids": [6], "min_tokens": 3}, [4, 5, 6], None),
        ({"stop_token_ids": [6], "min_tokens": 2}, [4, 5, 6], "stop"),
        ({"stop_token_ids": [3]}, [], None),  # that is the prompt's
    ],
)
def test_an_answer_that_lacks_only_its_end(
    sampling: dict[str, Any], tokens: list[int], reason: str | None
) -> None:
    answer = progress(context_length=20, **sampling)
    got(answer, *tokens)
    last = answer.last_item(13.0)
    assert (None if last is None else last.finish_reason) == reason
    assert answer.finished is (reason is not None)


def test_timings_have_the_work_of_all_engines() -> None:
    answer = progress()
    got(answer, 4)  # sent at 10 s, first token at 12 s, lost at 13 s
    assert survives(answer)
    answer.sent(14.0)
    timings = EngineTimings(queue_ms=1.0, prefill_ms=20.0, decode_ms=300.0)
    last = got(answer, 5, finish_reason="stop", timings=timings)
    assert last.timings == EngineTimings(1.0, 2020.0, 1300.0)


def test_the_time_of_a_handover_counts_once() -> None:
    """The engine that takes over is lost: only its time is measured from here."""
    answer = progress()
    got(answer, 4, timings=EngineTimings(queue_ms=1.0, prefill_ms=900.0, decode_ms=0.0))
    assert survives(answer)
    timings = EngineTimings(queue_ms=0.0, prefill_ms=20.0, decode_ms=300.0)
    last = got(answer, 5, finish_reason="stop", timings=timings)
    assert last.timings == EngineTimings(1.0, 920.0, 1300.0)


def test_an_engine_that_shuts_down_ends_requests_but_not_their_answers() -> None:
    timings = EngineTimings(0.0, 0.0, 0.0)
    output = EngineOutput([7], finish_reason="cancelled", timings=timings)
    failure = failure_in(output, stopped=False)
    assert failure is not None
    assert failure.info == ErrorInfo("unavailable", "The engine was shut down.")
    assert output == EngineOutput([7])


def test_what_the_client_cancelled_is_cancelled() -> None:
    output = EngineOutput([7], finish_reason="cancelled")
    assert failure_in(output, stopped=True) is None
    assert output.finish_reason == "cancelled"


def test_an_error_item() -> None:
    info = ErrorInfo("internal", "the engine failed", "seed")
    output = EngineOutput([7], error=info)
    failure = failure_in(output, stopped=True)
    assert failure is not None
    assert failure.info == info
    assert output == EngineOutput([7])


def test_the_limit_is_a_flag_or_an_environment_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["processor"])
    assert parse_args().migration_limit == DEFAULT_MIGRATION_LIMIT
    monkeypatch.setenv("MIGRATION_LIMIT", "0")
    assert parse_args().migration_limit == 0
    monkeypatch.setattr(sys, "argv", ["processor", "--migration-limit=7"])
    assert parse_args().migration_limit == 7
    for wrong in ("-1", "1.5", "many"):
        monkeypatch.setattr(sys, "argv", ["processor", f"--migration-limit={wrong}"])
        with pytest.raises(SystemExit):
            parse_args()
        assert f"{wrong!r} is not an integer of at least 0" in capsys.readouterr().err
