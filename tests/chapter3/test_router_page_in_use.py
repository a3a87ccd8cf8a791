"""The router's page of a running pipeline: what a person sees who looks at it meanwhile."""

from tests.chapter1.helpers import engine_settings, http_client, start_with_lease
from tests.chapter3.browser import chromium, opened
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import ask, prompt
from tests.conftest import StartPipeline

import playwright.async_api as pw

pw.expect.set_options(timeout=60_000)

ARGUMENTS = {
    "engine": engine_settings(decode_base_ms=1),
    "router": ["--policy", "round_robin", "--shadow", "earliest_start"],
}

OTHERS = ["engine0", "engine2", "router", "processor", "frontend"]
LEASE_S = 6  # a dead engine's card stays for so long; a busy engine must not lose it


async def test_a_pipeline_from_its_first_request_to_its_end(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """Decisions with their outcomes, an engine that is killed, a frontend that drains."""
    async with (
        start_pipeline(chapter="chapter3", engines=3, arguments=ARGUMENTS, start=OTHERS) as running,
        http_client(running.url) as client,
        chromium() as browser,
        opened(browser, f"{running.url}/router") as page,
    ):
        await start_with_lease(running, "engine1", LEASE_S).wait_ready()
        cards, lines = page.locator(".card"), page.locator("tr.line")
        await pw.expect(cards).to_have_count(3)
        await router_of(running).wait_ready(3)
        for _ in range(3):
            await ask(client, prompt("shared", 200), max_tokens=5)
        await pw.expect(lines).to_have_count(3)
        await pw.expect(page.locator("td.outcome", has_text="ms")).to_have_count(3)
        await pw.expect(page.locator("#policies")).to_contain_text("Disagrees in")
        await pw.expect(page.locator("#prefixes tbody tr")).not_to_have_count(0)
        await page.locator("tr.line", has=page.locator("td.otherwise")).first.click()
        detail = page.locator("tr.detail")
        await pw.expect(detail.locator(".terms tbody tr")).to_have_count(3)
        await pw.expect(detail).to_contain_text("earliest_start, would have chosen engine")
        await pw.expect(detail).to_contain_text("The answer had 5 tokens")

        running.processes["engine1"].kill()
        await pw.expect(cards.filter(has_text="Engine 1")).to_have_count(0)
        await pw.expect(cards).to_have_count(2)

        # The page's events are a request in flight, and must not hold the frontend up.
        assert await running.processes["frontend"].stop(20) == 0
        await pw.expect(page.locator("#banner")).to_contain_text("cannot be reached")
