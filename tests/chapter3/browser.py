"""The router's page in headless Chromium."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.common.test_page import FLAGS, GET_BROWSER, START_MS

import playwright.async_api as pw
import pytest


@asynccontextmanager
async def chromium() -> AsyncIterator[pw.Browser]:
    async with pw.async_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        if found is None and not os.path.exists(  # noqa: ASYNC240 (once)
            playwright.chromium.executable_path
        ):
            pytest.skip(GET_BROWSER)
        browser = await playwright.chromium.launch(
            executable_path=found, args=FLAGS, chromium_sandbox=False, timeout=START_MS
        )
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(browser: pw.Browser, url: str) -> AsyncIterator[pw.Page]:
    """The page at `url`; an error in its scripts or on its console fails the test."""
    context = await browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(60_000)
    page = await context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    await page.goto(url)
    try:
        yield page
    finally:
        await context.close()
    assert [error for error in errors if "Failed to load resource" not in error] == []
