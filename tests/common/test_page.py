"""The chat page in headless Chromium, against a small server with the real SSE encoder."""

import importlib.resources
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from common.openai import ChatStream, error_response, parse_chat
from common.protocol import (
    ChatMessage,
    EngineInfo,
    EngineTimings,
    ErrorInfo,
    PipelineError,
    TextOutput,
    Timings,
    Usage,
    to_wire,
)

import playwright.sync_api as pw
import pytest

GET_BROWSER = "needs Chromium: apt-get install chromium, or python -m playwright install chromium"
FLAGS = [
    "--disable-quic",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pw.expect.set_options(timeout=60_000)
START_MS = 100_000  # on a busy machine
MODEL = "SmolLM2-135M-Instruct"
EVIL = "<b>bold</b><img src=x onerror=document.title='owned'> & <script>alert(1)</script>"


class FakeServer(ThreadingHTTPServer):
    """Plays one canned answer for every question.

    `outputs` are sent in order, or with `at_once` in one piece. Before the item at `pause_at`
    the server waits for `resume`; with `endless` it repeats the last item until the client
    is gone.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine: EngineInfo | None = EngineInfo(MODEL, "llamacpp", 8192, 16, 512)
        self.refusal: ErrorInfo | None = None
        self.outputs: list[TextOutput] = []
        self.pause_at: int | None = None
        self.resume = threading.Event()
        self.endless = False
        self.at_once = False
        self.client_gone = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/":
            page = importlib.resources.files("common").joinpath("static/index.html")
            self.answer(200, page.read_bytes(), "text/html")
        else:
            assert self.path == "/health"
            engine = self.server.engine
            document = {"engine": to_wire(engine)} if engine else {"status": "unavailable"}
            self.answer(200 if engine else 503, json.dumps(document).encode())

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(json.loads(body))
        try:
            request = parse_chat(body)
            if self.server.refusal:
                raise PipelineError.of(self.server.refusal)
        except PipelineError as error:
            status, document = error_response(error.info)
            self.answer(status, json.dumps(document).encode())
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        stream = ChatStream("test", request)
        if self.server.at_once:
            self.wfile.write(b"".join(map(stream.chunk, self.server.outputs)))
            return
        try:
            for index, output in enumerate(self.server.outputs):
                if index == self.server.pause_at:
                    assert self.server.resume.wait(30)
                self.wfile.write(stream.chunk(output))
            while self.server.endless and not self.server.resume.wait(0.01):
                self.wfile.write(stream.chunk(self.server.outputs[-1]))
        except ConnectionError:
            self.server.client_gone.set()

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any, **__: Any) -> None:
        """Nothing: the base class would write to stderr."""


@pytest.fixture(scope="module")
def browser() -> Iterator[pw.Browser]:
    with pw.sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        if found is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip(GET_BROWSER)
        browser = playwright.chromium.launch(
            executable_path=found, args=FLAGS, chromium_sandbox=False, timeout=START_MS
        )
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.resume.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(browser: pw.Browser, server: FakeServer) -> Iterator[pw.Page]:
    """The page, opened; a script error or a console error on it fails the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 760})
    context.set_default_timeout(60_000)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(server.url)
    yield page
    context.close()
    assert [error for error in errors if "Failed to load resource" not in error] == []


def last(text: str, tokens: int = 4) -> TextOutput:
    return TextOutput(
        text=text,
        finish_reason="stop",
        usage=Usage(prompt_tokens=31, completion_tokens=tokens, cached_tokens=16),
        timings=Timings(0.4, 12.0, EngineTimings(queue_ms=1.0, prefill_ms=3.0, decode_ms=6.0)),
        worker_id=2,
    )


def ask(page: pw.Page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.keyboard.press("Enter")


def answer(page: pw.Page) -> pw.Locator:
    return page.get_by_label("Answer").last


def figure(page: pw.Page, label: str) -> str:
    row = answer(page).locator("dl.figures > div").filter(has=page.locator("dt", has_text=label))
    return row.locator("dd").inner_text()


def test_streams_and_shows_where_the_time_went(page: pw.Page, server: FakeServer) -> None:
    server.outputs = [TextOutput(text="Paris "), TextOutput(text="is 🥐"), last("!")]
    server.pause_at = 2
    ask(page, "What is the capital of France?")
    text = answer(page).locator(".text")
    pw.expect(text).to_have_text("Paris is 🥐")  # shown while the answer is unfinished
    pw.expect(answer(page)).to_have_attribute("aria-busy", "true")
    server.resume.set()
    pw.expect(text).to_have_text("Paris is 🥐!")
    assert [figure(page, label) for label in ("Prompt", "Cached", "Answer", "Worker")] == [
        "31 tokens",
        "16 tokens",
        "4 tokens",
        "2",
    ]
    assert figure(page, "TTFT").endswith("ms")
    assert figure(page, "Speed").endswith("tokens/s")
    components = ("Processor", "Queue", "Prefill", "Decode")
    times = [figure(page, label) for label in components]
    assert times == ["2.0 ms", "1.0 ms", "3.0 ms", "6.0 ms"]
    assert figure(page, "Frontend + network")
    assert figure(page, "Total")
    pw.expect(answer(page).locator(".bar span")).to_have_count(5)
    assert answer(page).get_attribute("aria-busy") is None


def test_answer_that_arrives_at_once(page: pw.Page, server: FakeServer) -> None:
    """A short answer may come in one piece with its end; it has a TTFT, though no speed."""
    server.outputs, server.at_once = [TextOutput(text="Yes"), last(".", tokens=2)], True
    ask(page, "Hi")
    pw.expect(answer(page).locator(".text")).to_have_text("Yes.")
    assert figure(page, "TTFT")
    pw.expect(answer(page).locator("dt", has_text="Speed")).to_have_count(0)


def test_sends_what_it_should(page: pw.Page, server: FakeServer) -> None:
    """The conversation grows turn by turn; New chat forgets it."""
    pw.expect(page.locator("#model")).to_have_text(MODEL)
    server.outputs = [last("Hello.")]
    ask(page, "One")
    pw.expect(page.get_by_label("Answer")).to_have_count(1)
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    ask(page, "Two")
    pw.expect(page.get_by_label("Answer")).to_have_count(2)
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    pw.expect(page.get_by_label("Answer")).to_have_count(0)
    ask(page, "Three")
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    first, second, third = server.requests
    assert first == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "One"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "nvext": {"extra_fields": ["worker_id", "timing"]},
        "temperature": 0.2,
        "max_tokens": 256,
    }
    contents = [message["content"] for message in second["messages"]]
    assert contents == ["One", "Hello.", "Two"]
    assert third["messages"] == [{"role": "user", "content": "Three"}]


def test_settings(page: pw.Page, server: FakeServer) -> None:
    server.outputs = [last("ok")]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Max tokens").fill("")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hi")
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    (request,) = server.requests
    assert request["temperature"] == 1.5
    assert "max_tokens" not in request
    chat = parse_chat(json.dumps(request).encode())
    roles = [ChatMessage(message.role, message.content) for message in chat.messages]  # type: ignore[arg-type]
    assert roles == [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")]


def test_stop_closes_the_connection(page: pw.Page, server: FakeServer) -> None:
    """The engine is cancelled by nothing but this: the server notices that the client left."""
    server.outputs = [TextOutput(text="word ")]
    server.endless = True
    ask(page, "Talk")
    pw.expect(answer(page).locator(".text")).to_contain_text("word word word")
    pw.expect(page.get_by_role("button", name="Send")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    assert server.client_gone.wait(10)
    pw.expect(answer(page)).to_contain_text("Stopped")
    pw.expect(answer(page).locator(".error")).to_have_count(0)
    pw.expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.endless = False
    server.outputs = [last("fine")]
    ask(page, "Again")
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    said = server.requests[1]["messages"][1]
    assert said["role"] == "assistant"
    assert said["content"].startswith("word word word")


def test_new_chat_ends_a_running_answer(page: pw.Page, server: FakeServer) -> None:
    server.outputs = [TextOutput(text="word ")]
    server.endless = True
    ask(page, "Talk")
    pw.expect(answer(page).locator(".text")).to_contain_text("word")
    page.get_by_role("button", name="New chat").click()
    assert server.client_gone.wait(10)
    pw.expect(page.get_by_label("Answer")).to_have_count(0)
    server.endless = False
    server.outputs = [last("fine")]
    ask(page, "Fresh")
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Fresh"}]


def test_refused_request_shows_the_servers_message(page: pw.Page, server: FakeServer) -> None:
    server.refusal = ErrorInfo("overloaded", "1024 requests are in flight; try again later.")
    ask(page, "Hi")
    pw.expect(answer(page).locator(".error")).to_have_text(server.refusal.message)
    pw.expect(page.get_by_label("Message")).to_have_value("Hi")  # ready to be sent again
    server.refusal = None
    server.outputs = [last("Hello.")]
    page.get_by_role("button", name="Send").click()
    pw.expect(answer(page).locator(".text")).to_have_text("Hello.")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_bad_setting_shows_the_servers_message(page: pw.Page, server: FakeServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("7")
    page.keyboard.press("Escape")
    ask(page, "Hi")
    pw.expect(answer(page).locator(".error")).to_contain_text("'temperature'")


def test_error_inside_the_stream(page: pw.Page, server: FakeServer) -> None:
    failed = TextOutput(error=ErrorInfo("unavailable", "The engine is gone."))
    server.outputs = [TextOutput(text="Half an"), failed]
    ask(page, "Hi")
    pw.expect(answer(page).locator(".text")).to_have_text("Half an")
    pw.expect(answer(page).locator(".error")).to_have_text("The engine is gone.")


def test_stream_that_breaks_off(page: pw.Page, server: FakeServer) -> None:
    server.outputs = [TextOutput(text="Half an")]
    ask(page, "Hi")
    pw.expect(answer(page).locator(".error")).to_contain_text("before the answer was complete")


def test_model_text_is_never_html(page: pw.Page, server: FakeServer) -> None:
    server.outputs = [TextOutput(text=EVIL[:20]), last(EVIL[20:])]
    ask(page, EVIL)
    pw.expect(answer(page).locator(".text")).to_have_text(EVIL)
    pw.expect(page.get_by_label("You").locator(".text")).to_have_text(EVIL)
    assert page.locator("article b, article img, article script").count() == 0
    assert page.title() == "Dynamo pipelines: chat"


def test_banner_while_the_pipeline_is_not_ready(page: pw.Page, server: FakeServer) -> None:
    banner = page.locator("#banner")
    pw.expect(page.locator("#model")).to_have_text(MODEL)
    pw.expect(banner).to_be_hidden()
    engine, server.engine = server.engine, None
    page.reload()
    pw.expect(banner).to_contain_text("not ready")
    server.engine = engine
    pw.expect(banner).to_be_hidden()
    pw.expect(page.locator("#model")).to_have_text(MODEL)


def test_banner_of_a_simulated_engine(page: pw.Page, server: FakeServer) -> None:
    """Nobody is to take its words for a model's; that it is not ready comes first."""
    banner = page.locator("#banner")
    server.engine = EngineInfo(MODEL, "simulated", 8192, 16, 512, simulated=True)
    page.reload()
    pw.expect(banner).to_contain_text("Simulated engine")
    server.outputs = [last("ok")]
    ask(page, "Hi")
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    pw.expect(banner).to_contain_text("Simulated engine")


def test_a_restart_with_another_model(page: pw.Page, server: FakeServer) -> None:
    """The page asks for the model that is there now, without a reload."""
    pw.expect(page.locator("#model")).to_have_text(MODEL)
    server.engine = EngineInfo("other", "llamacpp", 8192, 16, 512)
    server.refusal = ErrorInfo("model_not_found", f"The model '{MODEL}' does not exist.", "model")
    ask(page, "Hi")
    pw.expect(answer(page).locator(".error")).to_have_text(server.refusal.message)
    pw.expect(page.locator("#model")).to_have_text("other")
    server.refusal, server.outputs = None, [last("Hello.")]
    page.get_by_role("button", name="Send").click()
    pw.expect(answer(page).locator(".text")).to_have_text("Hello.")
    assert [request["model"] for request in server.requests] == [MODEL, "other"]


def test_keyboard(page: pw.Page, server: FakeServer) -> None:
    """Shift+Enter starts a new line; blank messages are not sent."""
    server.outputs = [last("ok")]
    message = page.get_by_label("Message")
    pw.expect(message).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    assert [r["messages"][0]["content"] for r in server.requests] == ["one\ntwo"]
    pw.expect(message).to_be_focused()


@pytest.mark.parametrize("width", [320, 1000])
def test_nothing_overflows_sideways(page: pw.Page, server: FakeServer, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    server.outputs = [TextOutput(text="x" * 300 + " "), last("a b c " * 50)]
    ask(page, "y" * 200)
    pw.expect(answer(page).locator(".bar")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('main').scrollWidth") <= width
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_asks_nothing_of_other_servers(browser: pw.Browser, server: FakeServer) -> None:
    """No CDN, no font, no telemetry: the page works on a machine without a network."""
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    pw.expect(page.locator("#model")).to_have_text(MODEL)
    context.close()
    assert asked
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []
