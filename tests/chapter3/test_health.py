"""Engine health in virtual time: what puts an engine into quarantine, and what brings it back."""

import itertools
import random
from dataclasses import replace

from chapter3.engine_record import Figures
from chapter3.health import FleetHealth

CHECK_S = 0.25


class Fleet:
    """Engines that answer as fast as they are told to, and a clock.

    `first_token_s` and `between_s` are per engine; every request is of `tokens` tokens.
    """

    def __init__(self, engines: int = 4, *, canaries: bool = True, seed: int = 0) -> None:
        self.health = FleetHealth(canaries=canaries)
        self.now = 1000.0
        self.rng = random.Random(seed)
        self.figures = {n: Figures(n, "model", busy=False) for n in range(engines)}
        self.first_token_s = dict.fromkeys(range(engines), 0.05)
        self.between_s = dict.fromkeys(range(engines), 0.01)
        self.failing: set[int] = set()
        self.stalled: set[int] = set()
        self._names = 0
        self.check()

    def check(self) -> None:
        self.health.check(self.figures, self.now)
        serving = [n for n, figures in self.figures.items() if figures.serves]
        assert len(set(self.out()) & set(serving)) <= len(serving) // 2

    def out(self) -> list[int]:
        return [n for n in self.figures if self.health.state(n) != "healthy"]

    def request(
        self, engine: int, *, own_tokens: int = 10, tokens: int | None = None, canary: bool = False
    ) -> None:
        """One after the other: the answer has come before the next is sent."""
        self._names += 1
        name = f"request {self._names}"
        self.health.sent(
            engine,
            name,
            self.now,
            own_tokens=own_tokens,
            tokens=own_tokens if tokens is None else tokens,
            canary=canary,
        )
        if engine in self.stalled:
            return
        if engine in self.failing:
            self.health.failed(engine, name, self.now)
            return
        noise = self.rng.uniform(0.7, 1.5)
        self.health.first_token(engine, name, self.first_token_s[engine] * noise, self.now)
        self.health.finished(engine, name, self.between_s[engine] * noise, 20, self.now)

    def run(self, seconds: float, *, requests: int = 1) -> None:
        """Let time pass; each engine that may serve gets so many requests every quarter."""
        end = self.now + seconds
        while self.now < end:
            for engine in self.figures:
                for _ in range(requests):
                    if self.health.may_serve(engine):
                        self.request(engine)
            for engine in self.health.canaries_due(self.now):
                self.request(engine, canary=True)
            self.now += CHECK_S
            self.check()

    def set(self, engine: int, **figures: object) -> None:
        self.figures[engine] = replace(self.figures[engine], **figures)  # type: ignore[arg-type]

    def seconds_until(self, state: str, engine: int, limit: float = 120.0) -> float:
        began = self.now
        while self.health.state(engine) != state:
            assert self.now - began < limit, f"not {state} after {limit} s"
            self.run(CHECK_S)
        return self.now - began


def test_engines_that_are_alike_stay_healthy_whatever_the_noise() -> None:
    for seed in range(5):
        fleet = Fleet(seed=seed)
        for _ in range(100):
            fleet.run(1.0)
            assert fleet.out() == []


def test_a_slow_first_token_is_found_within_seconds_and_forgiven_when_it_is_fast_again() -> None:
    fleet = Fleet()
    fleet.run(10)
    fleet.first_token_s[2] = 1.0
    assert fleet.seconds_until("quarantined", 2) < 15
    assert "ms to the first token" in fleet.health.why(2)
    fleet.run(30)
    assert fleet.out() == [2]
    fleet.first_token_s[2] = 0.05
    assert fleet.seconds_until("healthy", 2) < 10
    fleet.run(60)
    assert fleet.out() == []


def test_slow_decoding_is_found_although_first_tokens_are_fast() -> None:
    fleet = Fleet()
    fleet.between_s[1] = 0.2
    assert fleet.seconds_until("quarantined", 1) < 5
    assert "ms between tokens" in fleet.health.why(1)


def test_of_two_engines_the_slow_one_is_quarantined_and_not_the_other() -> None:
    fleet = Fleet(2)
    fleet.between_s[1] = 0.2
    fleet.run(20)
    assert fleet.out() == [1]


def test_an_only_engine_is_never_quarantined() -> None:
    fleet = Fleet(1)
    fleet.failing = {0}
    fleet.run(10)
    fleet.set(0, silent=True)
    fleet.run(10)
    assert fleet.health.state(0) == "healthy"
    assert "no metrics" in fleet.health.why(0)
    assert fleet.health.may_serve(0)


def test_a_long_queue_or_a_long_prompt_is_not_slowness() -> None:
    """Ten times the first token for ten times the tokens that were to be computed before it."""
    fleet = Fleet()
    for _ in range(40):
        for engine in range(3):
            fleet.first_token_s[engine] = 0.2
            fleet.request(engine, own_tokens=200)
            fleet.first_token_s[engine] = 0.05
        fleet.first_token_s[3] = 2.0
        fleet.request(3, own_tokens=200, tokens=2000)
        fleet.first_token_s[3] = 0.05
        fleet.now += CHECK_S
        fleet.check()
    assert fleet.out() == []


def test_tokens_between_which_prompts_are_computed_may_take_their_time() -> None:
    """One engine gets all the long prompts (0.1 ms a token); its running requests wait for them."""
    fleet = Fleet()
    health = fleet.health
    for n in range(40):
        for engine in (0, 1, 2):
            fleet.first_token_s[engine] = 0.1
            fleet.request(engine, own_tokens=1000)
            fleet.first_token_s[engine] = 0.05
        health.sent(3, f"long {n}", fleet.now, tokens=10, own_tokens=10)
        health.first_token(3, f"long {n}", 0.05, fleet.now)
        for m in range(10):
            fleet.first_token_s[3] = 0.1
            fleet.request(3, own_tokens=1000)
            fleet.first_token_s[3] = 0.05
            assert health.state(3) == "healthy", m
        health.finished(3, f"long {n}", 0.01 + 10 * 0.1 / 19, 20, fleet.now)
        fleet.now += CHECK_S
        fleet.check()
    assert fleet.out() == []


def test_a_large_batch_excuses_slow_tokens_in_proportion() -> None:
    fleet = Fleet()
    health = fleet.health
    fleet.run(5)
    for n in range(20):
        for m in range(8):
            health.sent(3, f"{n}/{m}", fleet.now, tokens=10, own_tokens=10)
            health.first_token(3, f"{n}/{m}", 0.05, fleet.now)
        for m in range(8):
            health.finished(3, f"{n}/{m}", 0.08, 20, fleet.now)
        fleet.run(CHECK_S)
    assert fleet.out() == []


def test_requests_that_wait_for_a_place_say_nothing_about_the_engine() -> None:
    fleet = Fleet()
    fleet.run(5)
    fleet.set(3, waiting=5, busy=True)
    for n in range(20):
        fleet.check()
        fleet.health.sent(3, f"{n}", fleet.now, tokens=10, own_tokens=10, waits=True)
        fleet.health.first_token(3, f"{n}", 5.0, fleet.now)
        fleet.health.finished(3, f"{n}", 0.01, 20, fleet.now)
    fleet.run(1, requests=0)
    assert fleet.out() == []


def test_engines_of_different_kinds_are_not_compared() -> None:
    """One that computes prompts is slow beside those that get them computed."""
    fleet = Fleet(engines=5)
    fleet.figures = {n: Figures(n, "prefill" if n < 2 else "decode", busy=False) for n in range(5)}
    fleet.health.engines.clear()
    fleet.first_token_s |= {0: 2.0, 1: 2.0}
    fleet.run(60)
    assert fleet.out() == []
    fleet.first_token_s[3] = 2.0
    assert fleet.seconds_until("quarantined", 3) < 60


def test_an_engine_without_metrics_is_out_at_once_and_back_when_it_is_heard_and_answers() -> None:
    fleet = Fleet()
    fleet.set(1, silent=True)
    fleet.stalled = {1}
    assert fleet.seconds_until("quarantined", 1) <= CHECK_S
    fleet.run(100)
    assert fleet.out() == [1]
    fleet.set(1, silent=False)
    fleet.stalled = set()
    assert fleet.seconds_until("healthy", 1) < 5


def test_an_overdue_first_token_is_evidence_without_any_report() -> None:
    fleet = Fleet()
    fleet.run(5)
    fleet.stalled = {0}
    fleet.set(0, busy=True)
    assert 2 < fleet.seconds_until("quarantined", 0) < 6
    assert "no first token for" in fleet.health.why(0)
    fleet.run(60)
    assert fleet.health.state(0) == "quarantined"
    fleet.stalled = set()
    fleet.health.ended(0, next(iter(fleet.health.engines[0].sent)))  # its canary, much too late
    assert fleet.seconds_until("healthy", 0) < 5


def test_a_request_that_waits_while_the_engine_gets_on_is_not_overdue() -> None:
    fleet = Fleet()
    fleet.run(5)
    fleet.health.sent(0, "waits", fleet.now, tokens=10, own_tokens=10, waits=True)
    for n in range(100):
        fleet.set(0, busy=True, waiting=1, done=n // 4)
        fleet.now += CHECK_S
        fleet.check()
    assert fleet.out() == []


def test_a_long_prompt_is_not_overdue_on_engines_whose_speed_is_not_known() -> None:
    fleet = Fleet(2)
    fleet.set(0, busy=True)
    fleet.health.sent(0, "long", fleet.now, tokens=8000, own_tokens=8000)
    for _ in range(4 * 60):
        fleet.now += CHECK_S
        fleet.check()
    assert fleet.out() == []


def test_requests_whose_end_nobody_reports_are_forgotten_when_the_engine_is_idle() -> None:
    """Their processor was killed."""
    fleet = Fleet()
    fleet.run(5)
    fleet.set(0, busy=True)
    for n in range(3):
        fleet.health.sent(0, f"lost {n}", fleet.now, tokens=10, own_tokens=10)
    fleet.check()
    fleet.set(0, busy=False, done=9)
    fleet.run(20)
    assert fleet.out() == []
    assert not fleet.health.engines[0].sent


def test_failures_are_evidence_when_others_do_not_fail() -> None:
    fleet = Fleet()
    fleet.run(5)
    fleet.failing = {3}
    assert fleet.seconds_until("quarantined", 3) < 2
    assert "requests failed" in fleet.health.why(3)
    fleet.run(20)
    assert fleet.out() == [3]
    fleet.failing = set()
    assert fleet.seconds_until("healthy", 3) < 5


def test_failures_that_all_engines_have_alike_are_not_the_engines() -> None:
    fleet = Fleet()
    for n in range(40):
        for engine in range(4):
            fleet.request(engine)
            fleet.health.failed(engine, f"bad {n} {engine}", fleet.now)
        fleet.now += CHECK_S
        fleet.check()
    assert fleet.out() == []


def test_how_requests_ended_is_remembered_for_seconds_and_not_for_ever() -> None:
    fleet = Fleet()
    fleet.run(10)
    some = len(fleet.health.engines[0].ends)
    fleet.run(60)
    assert len(fleet.health.engines[0].ends) <= 2 * some
    fleet.failing = {1}
    fleet.request(1)
    fleet.failing = set()
    fleet.run(20)
    assert fleet.health.engines[1].failures() == (0, 0.0)


def test_who_fails_right_after_it_came_back_is_kept_out_longer_each_time_up_to_a_bound() -> None:
    fleet = Fleet()
    lengths = []
    for _ in range(8):
        fleet.failing = {0}
        fleet.seconds_until("quarantined", 0)
        began = fleet.now
        fleet.failing = set()
        fleet.seconds_until("healthy", 0)
        lengths.append(fleet.now - began)
    assert lengths[0] < 4
    assert all(later >= earlier for earlier, later in itertools.pairwise(lengths))
    assert 25 < lengths[-1] < 40
    fleet.run(70)
    fleet.failing = {0}
    fleet.seconds_until("quarantined", 0)
    fleet.failing = set()
    assert fleet.seconds_until("healthy", 0) < 4


def test_when_all_are_bad_half_of_them_stay_and_these_are_the_least_bad() -> None:
    fleet = Fleet(5)
    fleet.failing = {0}
    fleet.run(5)
    fleet.set(1, silent=True)
    fleet.set(2, silent=True)
    fleet.run(5)
    assert fleet.out() == [1, 2]
    assert "enough engines are quarantined" in fleet.health.why(0)
    fleet.figures = {n: replace(f, silent=True) for n, f in fleet.figures.items()}
    fleet.run(10)
    assert len(fleet.out()) == 2


def test_one_that_leaves_makes_the_least_bad_of_the_others_serve_again() -> None:
    fleet = Fleet()
    fleet.set(0, silent=True)
    fleet.between_s[1] = 0.5
    fleet.run(5)
    assert fleet.out() == [0, 1]
    del fleet.figures[2]
    fleet.run(1)
    assert fleet.out() == [0]


def test_an_engine_that_is_gone_already_takes_nobodys_place() -> None:
    """Four engines, of which two are killed and listed still: one of the others may be out."""
    fleet = Fleet()
    for engine in (0, 1):
        fleet.set(engine, serves=False)
    fleet.figures = {n: replace(f, silent=True) for n, f in fleet.figures.items()}
    fleet.run(1)
    assert sum(fleet.health.may_serve(n) for n in (2, 3)) == 1


def test_while_probing_one_client_request_at_a_time() -> None:
    fleet = Fleet(2, canaries=False)
    fleet.failing = {0}
    fleet.seconds_until("quarantined", 0)
    assert not fleet.health.may_serve(0)
    fleet.failing = set()
    fleet.seconds_until("probing", 0)
    health = fleet.health
    assert health.may_serve(0)
    health.sent(0, "probe", fleet.now, tokens=10, own_tokens=10)
    assert not health.may_serve(0)
    health.first_token(0, "probe", 0.05, fleet.now)
    health.finished(0, "probe", 0.01, 20, fleet.now)
    assert health.state(0) == "probing"
    assert health.may_serve(0)
    fleet.request(0)
    assert health.state(0) == "healthy"


def test_an_idle_fleet_finds_its_slow_engine_by_canaries_alone() -> None:
    fleet = Fleet()
    fleet.first_token_s[3] = 2.0
    began = fleet.now
    while fleet.health.state(3) == "healthy":
        fleet.run(CHECK_S, requests=0)
        assert fleet.now - began < 60
    fleet.first_token_s[3] = 0.05
    began = fleet.now
    while fleet.health.state(3) != "healthy":
        fleet.run(CHECK_S, requests=0)
        assert fleet.now - began < 10


def test_who_was_not_looking_itself_judges_nobody_by_its_silence() -> None:
    """The router was stopped for a while: all that it has heard is old."""
    fleet = Fleet()
    fleet.run(5)
    fleet.now += 20
    fleet.figures = {n: replace(f, silent=True) for n, f in fleet.figures.items()}
    fleet.check()
    assert fleet.out() == []


def test_what_a_late_answer_took_is_not_held_against_an_engine_that_is_back() -> None:
    fleet = Fleet()
    fleet.run(5)
    for n in range(10):
        fleet.health.sent(0, f"late {n}", fleet.now, tokens=10, own_tokens=10)
    fleet.stalled = {0}
    fleet.set(0, silent=True)
    fleet.run(10)
    fleet.set(0, silent=False)
    fleet.stalled = set()
    fleet.seconds_until("healthy", 0)
    for n in range(10):
        fleet.health.first_token(0, f"late {n}", 10.0, fleet.now)
        fleet.health.finished(0, f"late {n}", 1.0, 20, fleet.now)
    fleet.run(5)
    assert fleet.out() == []


def test_a_slow_engine_that_is_busy_with_long_answers_is_found_by_canaries() -> None:
    """Its requests would tell only at their end; one slow first token is enough to look closer."""
    fleet = Fleet()
    fleet.run(5)
    fleet.first_token_s[2] = 2.0
    fleet.health.sent(2, "long", fleet.now, tokens=10, own_tokens=10)
    fleet.health.engines[2].latencies.clear()
    fleet.health.first_token(2, "long", 2.0, fleet.now)
    for _ in range(40):
        for engine in fleet.health.canaries_due(fleet.now):
            fleet.request(engine, canary=True)
        fleet.now += CHECK_S
        fleet.check()
    assert fleet.out() == [2]
