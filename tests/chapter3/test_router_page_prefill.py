"""What the router's page and its data say of prompts that another engine computes."""

from chapter3.decision_log import DecisionLog
from chapter3.disaggregation import PrefillRule
from chapter3.watch import Watched, Watcher, watched_decision
from common.protocol_routing import ReportKind, RequestReport
from common.protocol_watch import WatchedOutcome
from tests.chapter3.browser import chromium, opened
from tests.chapter3.page_server import FIRST_ENGINE, page_server
from tests.chapter3.test_disaggregation import P0, P1, PROMPT, choice, of_roles

import playwright.async_api as pw
import pytest


def report(log: DecisionLog, name: str, instance: int, kind: ReportKind, ms: float) -> None:
    log.report(RequestReport(name, instance, kind, ms, 1))


def test_a_decision_has_both_engines_and_counts_for_both() -> None:
    selector = of_roles("prefill", "decode")
    watched = Watched(selector)
    for number, tokens in enumerate((PROMPT, [1, 2, 3], [7, *PROMPT])):
        watched.add(f"r{number}/0", choice(selector, f"r{number}/0", tokens=tokens))
    update = watched.update(0.0)
    assert [(worker.role, worker.chosen) for worker in update.workers] == [
        ("prefill", 2),
        ("decode", 3),
    ]
    assert update.decided == 3
    shown = [watched_decision(logged) for logged in watched.log.recent]
    assert [decision.prefill for decision in shown] == [0, None, 0]


@pytest.mark.parametrize("computed", [True, False])
def test_the_first_token_includes_the_time_of_the_prefill_engine(computed: bool) -> None:
    """A failure of the one that computes the prompt is not the request's."""
    selector = of_roles("prefill", "decode")
    watched = Watched(selector)
    watched.add("r/0", choice(selector, "r/0"))
    watcher = Watcher(watched)
    assert watcher.update(0.0).outcomes == []
    if computed:
        report(watched.log, "r/0/prefill", P0, "first_token", 500.0)
    report(watched.log, "r/0/prefill", P0, "finished" if computed else "failed", 0.0)
    assert watcher.update(0.0).outcomes == []
    report(watched.log, "r/0", P1, "first_token", 20.0)
    expected = WatchedOutcome(1, "answering", 520.0 if computed else 20.0)
    assert watcher.update(0.0).outcomes == [expected]


async def test_the_page_shows_roles_and_ways() -> None:
    """And the filter by engine finds what it computed for others."""
    async with chromium() as browser, page_server() as server:
        router = server.routers.add(engines=3)
        router.selector.prefill_rule = PrefillRule(100)
        for number, role in enumerate(("decode", "decode", "prefill")):
            router.selector.workers[FIRST_ENGINE + number].source.role = role  # type: ignore[assignment]
        async with opened(browser, f"{server.url}/router") as page:
            cards = page.locator(".card")
            await pw.expect(cards).to_have_count(3)
            await pw.expect(cards.locator(".role")).to_have_text(["decode", "decode", "prefill"])
            router.decide(65)
            router.decide(1000)
            lines = page.locator("tr.line")
            await pw.expect(lines).to_have_count(2)
            await pw.expect(page.locator("td", has_text="by way of 2")).to_have_count(1)
            await lines.first.click()
            detail = page.locator("tr.detail")
            await pw.expect(detail).to_contain_text("Engine 2 computes the prompt for it.")
            await pw.expect(cards.last).to_contain_text("Chosen in50 %")
            await page.locator("#only-worker").select_option("2")
            await pw.expect(lines).to_have_count(1)
