"""What the processor answers for itself, so that one request cannot hurt the others."""

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

from benchmarks.toy_model import toy_model
from common.prompt import INLINE_CHARACTERS, tokenize
from common.protocol import ChatMessage, ProcessRequest
from common.text import TextModel
from tests.chapter1.helpers import CHAT, chat, eventually, http_client, lines_about
from tests.conftest import StartPipeline

import httpx
import pytest


class SlowModel:
    """Its tokenizer returns only when the event loop has done something else."""

    name = "slow"

    def __init__(self) -> None:
        self.loop_ran = threading.Event()

    def check_token_ids(self, token_ids: Any, param: str) -> None: ...

    def render_chat(self, messages: list[ChatMessage]) -> str:
        return messages[0].content

    def encode(self, text: str) -> list[int]:
        assert self.loop_ran.wait(timeout=10), "the event loop waits for the tokenizer"
        return [1]


async def test_a_long_prompt_does_not_stop_the_other_streams() -> None:

    model = SlowModel()
    request = ProcessRequest("slow", messages=[ChatMessage("user", "x" * INLINE_CHARACTERS)])
    asyncio.get_running_loop().call_later(0.01, model.loop_ran.set)
    assert await tokenize(cast(TextModel, model), request) == [1]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_prompt_of_half_a_million_tokens(start_pipeline: StartPipeline, path: str) -> None:
    """It would not fit into a NATS message, whose failure the runtime blames on the engine."""
    text = "\U0002dffe" * 60_000  # several tokens each
    body = chat(text) if path == CHAT else {"model": chat()["model"], "prompt": text}
    arguments = {"frontend": ["--max-body-bytes=1000000"]}
    async with start_pipeline(arguments=arguments) as running, http_client(running.url) as client:
        response = await client.post(path, json=body)
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert "tokens, but the context length is" in error["message"]
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def test_an_engine_of_another_model(start_pipeline: StartPipeline, tmp_path: Path) -> None:
    """Token ids of one vocabulary mean nothing in another."""
    arguments = {"processor": ["--model", str(toy_model(tmp_path / "toy"))]}
    async with (
        start_pipeline(arguments=arguments, wait=False) as running,
        http_client(running.url) as client,
    ):

        async def refuses() -> bool:
            try:
                health = await client.get("/health")
            except httpx.ConnectError:
                return False
            reason = health.json().get("reason", "")
            return health.status_code == 503 and "SmolLM2-135M-Instruct" in reason

        await eventually(refuses)
        response = await client.post(CHAT, json=chat() | {"model": "toy"})
        assert response.status_code == 503
        assert "toy" in response.json()["error"]["message"]


async def test_a_signal_while_it_waits_for_an_engine(start_pipeline: StartPipeline) -> None:
    async with start_pipeline(start=["processor", "frontend"], wait=False) as running:
        frontend, processor = running.processes["frontend"], running.processes["processor"]
        await eventually(lambda: lines_about(frontend, "listening on"))
        await processor.wait_ready()
        processor.terminate()
        assert await processor.wait(timeout=20) == 0
        frontend.terminate()
        assert await frontend.wait(timeout=20) == 0
