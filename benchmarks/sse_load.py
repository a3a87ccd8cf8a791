"""A closed-loop load of streamed chat completions over raw sockets.

The client shares the machine with what it measures, so it does as little as it can: it looks
for the first token's event and the token counts and decodes nothing else.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """Seconds from the request to the first token and to the end; tokens and events in all.

    `worker_id` is there if the request asks for it, `request_id` is the server's.
    """

    ttft_s: float
    total_s: float
    tokens: int
    events: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    worker_id: int | None = None
    request_id: str = ""


@dataclass(frozen=True)
class Load:
    """The answers of one run, and the seconds it took."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def ttfts_ms(self) -> list[float]:
        return [answer.ttft_s * 1e3 for answer in self.answers]


async def run_load(port: int, bodies: list[dict[str, Any]], streams: int) -> Load:
    """Send the requests, `streams` of them at a time, and read every answer to its end.

    Raises:
        RuntimeError: an answer was an error, or had no token counts.
    """
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def one_stream() -> None:
        for body in waiting:
            answers.append(await ask(port, body))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(streams):
            tasks.create_task(one_stream())
    return Load(answers, time.perf_counter() - started)


async def ask(port: int, body: dict[str, Any], arrivals: list[float] | None = None) -> Answer:
    """Send one request, of a completion if it has a `prompt`, and read its answer to the end.

    `arrivals` gets the `time.perf_counter()` of every event with text.

    Raises:
        RuntimeError: it was an error, or had no token counts.
    """
    path, text = b"chat/completions", b'"content":"'
    if "prompt" in body:
        path, text = b"completions", b'"text":"'
    document = json.dumps(
        {**body, "stream": True, "stream_options": {"include_usage": True}}
    ).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/%b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (path, len(document), document)
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()}")
        first, events = 0.0, 0
        usage: dict[str, Any] = {}
        worker_id: int | None = None
        request_id = ""
        async for line in reader:
            if not line.startswith(b"data: "):
                if line.lower().startswith(b"x-request-id:"):
                    request_id = line.partition(b":")[2].strip().decode()
                continue
            events += 1
            if arrivals is not None and text in line and text + b'"' not in line:
                arrivals.append(time.perf_counter())
            # The role may come in an event of its own, before there is any token.
            if not first and text in line and text + b'"' not in line:
                first = time.perf_counter() - started
            if b'"completion_tokens":' in line:
                usage = json.loads(line[6:])["usage"]
            if b'"worker_id":' in line:
                worker_id = json.loads(line[6:])["nvext"]["worker_id"]
        if not first or not usage:
            raise RuntimeError("the stream ended without tokens or token counts")
        return Answer(
            first,
            time.perf_counter() - started,
            usage["completion_tokens"],
            events,
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
            worker_id,
            request_id,
        )
    finally:
        writer.close()
