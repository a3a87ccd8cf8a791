"""The router's page in headless Chromium, with routers that decide as fast as a test likes."""

from collections.abc import AsyncIterator

from chapter3.decision import PolicyInUse
from common.protocol_watch import WatchedQueue
from tests.chapter1.helpers import eventually
from tests.chapter3.browser import chromium, opened
from tests.chapter3.page_server import FIRST_ENGINE, PageServer, deciding, page_server

import playwright.async_api as pw
import pytest
import pytest_asyncio

EVIL = "<img src=x onerror=document.title='owned'>"


# One browser for all tests, and one event loop, on which it lives.
pytestmark = pytest.mark.asyncio(loop_scope="module")
pw.expect.set_options(timeout=60_000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[pw.Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def server() -> AsyncIterator[PageServer]:
    async with page_server() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: pw.Browser, server: PageServer) -> AsyncIterator[pw.Page]:
    async with opened(browser, f"{server.url}/router") as page:
        yield page


def lines(page: pw.Page) -> pw.Locator:
    return page.locator("tr.line")


def card(page: pw.Page, worker_id: int) -> pw.Locator:
    return page.locator(".card").filter(has_text=f"Engine {worker_id}")


async def test_engines_policies_and_an_explained_decision(
    server: PageServer, page: pw.Page
) -> None:
    """A newcomer's first look, from no router to a decision with all its terms."""
    banner = page.locator("#banner")
    await pw.expect(banner).to_contain_text("No router is up")
    router = server.routers.add()
    await pw.expect(banner).to_be_hidden()
    await pw.expect(page.locator(".card")).to_have_count(4)
    await pw.expect(card(page, 3)).to_contain_text("30 %")  # of the cache is filled
    await pw.expect(page.locator("#policies")).to_contain_text("in_two_terms")
    await pw.expect(page.locator("#empty")).to_be_visible()
    router.decide(1000)
    await pw.expect(lines(page)).to_have_count(1)
    await pw.expect(lines(page)).to_contain_text("Engine 0")
    await pw.expect(lines(page)).to_contain_text("13 ms")
    router.decide(1000)
    await pw.expect(lines(page)).to_have_count(2)
    await lines(page).first.click()
    terms = page.locator(".terms")
    headings = await terms.locator("th").all_inner_texts()
    assert headings == [
        "Engine", "Cached blocks", "Running", "Waiting", "queue", "prefill", "Score",
        "Shadow's score",
    ]  # fmt: skip
    await pw.expect(terms.locator("tbody tr")).to_have_count(4)
    await pw.expect(terms.locator("tr.winner")).to_contain_text("chosen")
    await pw.expect(terms.locator("tr.winner")).to_contain_text("0.117")
    await pw.expect(page.locator("tr.detail")).to_contain_text("won by")
    await pw.expect(page.locator("tr.detail")).to_contain_text("The answer had 7 tokens")
    await pw.expect(page.locator("#prefixes tbody tr")).to_have_count(1)
    await pw.expect(page.locator("#prefixes tbody tr")).to_contain_text("64")


async def test_what_the_shadow_policy_would_have_done(server: PageServer, page: pw.Page) -> None:
    """Least loaded disagrees once the prefix is cached where the other engines are freer."""
    router = server.routers.add()
    router.decide(1000, end=False)
    router.selector.policy = PolicyInUse.named("session_affinity")
    router.selector.shadow = PolicyInUse.named("kv")
    for _ in range(3):
        router.decide(1000, end=False)
    await pw.expect(lines(page)).to_have_count(4)
    otherwise = page.locator("td.otherwise")
    count = await otherwise.count()
    assert count >= 1
    await page.get_by_label("shadow disagrees").check()
    await pw.expect(lines(page)).to_have_count(count)
    await otherwise.first.click()
    detail = page.locator("tr.detail")
    await pw.expect(detail).to_contain_text("The shadow policy, kv, would have chosen engine")
    await pw.expect(detail.locator(".badge.shadow")).to_have_count(1)
    await pw.expect(detail.locator("tr.winner .badge.shadow")).to_have_count(0)
    await pw.expect(page.locator("#policies")).to_contain_text("Disagrees in")
    await pw.expect(page.locator("#disagreement")).to_be_visible()


async def test_a_thousand_decisions_a_second(server: PageServer, page: pw.Page) -> None:
    """The page shows a sample and says so, keeps what is open, and answers to its user."""
    router = server.routers.add(engines=8)
    async with deciding(router, 1000):
        await pw.expect(page.locator("#sample")).to_contain_text("a sample, evenly spread")
        await pw.expect(lines(page)).to_have_count(40)
        # At once: between the press and the release of a real button the line may move on.
        await lines(page).nth(3).dispatch_event("click")
        await pw.expect(page.locator("#sample")).to_contain_text("Paused")
        was_open = await page.locator(".toggle[aria-expanded=true]").get_attribute("aria-label")
        first = await lines(page).first.inner_text()
        decided = await page.locator("#decided").inner_text()
        await pw.expect(page.locator("#decided")).not_to_have_text(decided)  # the rest goes on
        assert await lines(page).first.inner_text() == first
        await page.get_by_role("button", name="Resume").click()
        await pw.expect(lines(page).first).not_to_have_text(first)
        still = page.get_by_label(str(was_open), exact=True)
        await pw.expect(still).to_have_attribute("aria-expanded", "true")
        await pw.expect(page.locator("tr.detail")).to_have_count(1)
        await eventually(lambda: router.decided > 3000, timeout=60)
        assert await lines(page).count() <= 41
        # A script that hangs, or a frame that never comes, would hang this, too.
        await page.evaluate("new Promise(requestAnimationFrame)")
        nodes = await page.evaluate("document.getElementsByTagName('*').length")
        assert nodes < 3000


async def test_pause_and_filter_by_engine(server: PageServer, page: pw.Page) -> None:
    router = server.routers.add()
    for _ in range(8):
        router.decide(end=False)
    await pw.expect(lines(page)).to_have_count(8)
    await page.get_by_role("button", name="Pause").click()
    router.decide()
    await pw.expect(page.locator("#sample")).to_contain_text("Paused; 1 decision since")
    await pw.expect(lines(page)).to_have_count(8)
    await page.get_by_label("Engine", exact=True).select_option("1")
    chosen = page.locator("tr.line td:nth-child(5)")
    await pw.expect(chosen.filter(has_not_text="Engine 1")).to_have_count(0)
    await pw.expect(chosen).not_to_have_count(0)
    await page.get_by_label("Engine", exact=True).select_option("all")
    await pw.expect(lines(page)).to_have_count(8)


async def test_an_engine_that_is_ill_and_one_that_left(server: PageServer, page: pw.Page) -> None:
    router = server.routers.add()
    await pw.expect(page.locator(".card")).to_have_count(4)
    router.selector.fail(FIRST_ENGINE + 1)
    await pw.expect(card(page, 1)).to_contain_text("failed")
    await pw.expect(page.locator(".card.unwell")).to_have_count(1)
    router.selector.remove(FIRST_ENGINE + 1)
    await pw.expect(page.locator(".card")).to_have_count(3)
    await pw.expect(card(page, 1)).to_have_count(0)


async def test_requests_that_wait_in_the_router(server: PageServer, page: pw.Page) -> None:
    router = server.routers.add()
    await pw.expect(page.locator("#queued")).to_have_text("0")
    router.watched.queue = lambda: WatchedQueue(
        waiting=3,
        limit=100,
        oldest_ms=250.0,
        waiting_by_priority={"5": 2, "0": 1},
        waiting_by_tenant={EVIL: 3},
        refused=7,
    )
    await pw.expect(page.locator("#queued")).to_have_text("3")
    queue = page.locator("#queue")
    for text in ("3 of at most 100", "250 ms", "5: 2 · 0: 1", f"{EVIL}: 3", "7"):
        await pw.expect(queue).to_contain_text(text)


async def test_a_name_that_turns_the_direction_of_text_turns_nothing(
    server: PageServer, page: pw.Page
) -> None:
    """Else one tenant makes the counts of all that stand behind it unreadable."""
    router = server.routers.add()
    router.watched.queue = lambda: WatchedQueue(
        waiting=3, waiting_by_tenant={"\u202eemca": 2, "other": 1}
    )
    await pw.expect(page.locator("#queue")).to_contain_text("\ufffdemca: 2 · other: 1")


async def test_the_scores_of_our_policy_are_in_sight(server: PageServer, page: pw.Page) -> None:
    """Four terms, the score and the shadow's fit on a laptop's screen without scrolling."""
    router = server.routers.add()
    router.selector.policy = router.selector.shadow = PolicyInUse.named("earliest_start")
    for _ in range(4):  # the last goes to the engine that is idle, by both: two badges
        router.decide(1000, end=False)
    await pw.expect(lines(page)).to_have_count(4)
    await lines(page).first.click()
    await pw.expect(page.locator(".terms th")).to_have_count(10)
    await pw.expect(page.locator(".terms .winner .badge")).to_have_text(["chosen", "shadow"])
    needed, there = await page.evaluate("""() => {
        const scroll = document.querySelector("tr.detail .scroll");
        return [scroll.scrollWidth, scroll.clientWidth];
    }""")
    assert needed <= there


async def test_several_routers_and_one_that_goes(server: PageServer, page: pw.Page) -> None:
    first, second = server.routers.add(), server.routers.add()
    await pw.expect(page.locator("#routers")).to_contain_text("2 routers")
    first.decide()
    second.decide()
    await pw.expect(lines(page)).to_have_count(2)
    await pw.expect(page.locator(".card")).to_have_count(4)
    await pw.expect(page.locator("#decided")).to_have_text("2")
    await lines(page).first.click()
    await pw.expect(page.locator("tr.detail")).to_contain_text("Router ")
    del server.routers.routers[second.watched.router]
    await pw.expect(page.locator("#routers")).to_have_text("")
    await server.page.aclose()
    await pw.expect(page.locator("#banner")).to_contain_text("shutting down")


async def test_names_that_clients_send_are_never_html(server: PageServer, page: pw.Page) -> None:
    router = server.routers.add()
    mine = PolicyInUse(EVIL, lambda snapshot: [{EVIL: 0.0} for _ in snapshot.workers])
    router.selector.policy = mine
    router.decide()
    await lines(page).first.click()
    await pw.expect(page.locator(".terms th").nth(4)).to_have_text(EVIL)
    assert await page.locator("main img").count() == 0
    assert await page.title() == "Dynamo pipelines: router"


@pytest.mark.parametrize("width", [320, 1400])
async def test_nothing_overflows_sideways(server: PageServer, page: pw.Page, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 800})
    router = server.routers.add(engines=16)
    for _ in range(3):
        router.decide(end=False)
    await lines(page).first.click()
    await pw.expect(page.locator(".terms tbody tr")).to_have_count(16)
    await pw.expect(page.locator(".card")).to_have_count(16)
    assert await page.evaluate("document.documentElement.scrollWidth") <= width


async def test_by_keyboard(server: PageServer, page: pw.Page) -> None:
    router = server.routers.add()
    router.decide()
    toggle = page.locator(".toggle")
    await toggle.focus()
    await page.keyboard.press("Enter")
    await pw.expect(toggle).to_have_attribute("aria-expanded", "true")
    await page.keyboard.press("Enter")
    await pw.expect(toggle).to_have_attribute("aria-expanded", "false")
    await pw.expect(page.locator("tr.detail")).to_have_count(0)
