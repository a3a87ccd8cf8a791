"""What the tests of the routed pipeline share: calls of endpoints, what the router believes."""

import asyncio
import subprocess
import sys
import threading
from typing import Any, TypeVar

from common.kv import BlockStored
from common.protocol_router import FindWorkerOutput, KvSnapshotPart, KvSource, WorkerState
from launch.pipeline import Pipeline
from tests.chapter1.helpers import CHAT, MODEL, chat, eventually

import httpx
import msgspec

T = TypeVar("T")
WORKER = {"nvext": {"extra_fields": ["worker_id"]}}

Blocks = dict[int, frozenset[int]]  # of each instance, the hashes of what it has cached


class Reply(msgspec.Struct):
    """See `tests.chapter2.runtime_caller`."""

    items: msgspec.Raw = msgspec.Raw(b"[]")
    instances: list[int] = []
    error: str | None = None


class RuntimeCaller:
    """Calls endpoints through a process of its own, because tests have event loops of theirs."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._lock = threading.Lock()

    async def call(
        self, path: str, request: Any, answer: type[T], instance: int | None = None
    ) -> list[T]:
        """The items of the stream; RuntimeError if it fails."""
        reply = await self._ask({"path": path, "request": request, "instance": instance})
        return msgspec.json.decode(reply.items, type=list[answer])  # type: ignore[valid-type]

    async def instances(self, path: str) -> list[int]:
        """Those that discovery lists."""
        return sorted((await self._ask({"path": path})).instances)

    async def _ask(self, call: dict[str, Any]) -> Reply:
        reply = await asyncio.to_thread(self._exchange, msgspec.json.encode(call))
        if reply.error is not None:
            raise RuntimeError(reply.error)
        return reply

    def _exchange(self, line: bytes) -> Reply:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
            return msgspec.json.decode(self._process.stdout.readline(), type=Reply)


class Router:
    """A pipeline's router and its engines, as the runtime shows them."""

    def __init__(self, caller: RuntimeCaller, running: Pipeline) -> None:
        self.caller = caller
        self.running = running

    async def find_raw(self, request: Any) -> FindWorkerOutput:
        path = f"{self.running.namespace}.router.find_worker"
        (output,) = await self.caller.call(path, request, FindWorkerOutput)
        return output

    async def find(self, token_ids: list[int], **fields: Any) -> FindWorkerOutput:
        request = {"token_ids": token_ids, "model": MODEL, **fields}
        return await self.find_raw(request)

    async def state(self, router: int | None = None, **fields: Any) -> list[WorkerState]:
        """What the router (if there are several: this instance) believes, by worker id."""
        path = f"{self.running.namespace}.router.state"
        states = await self.caller.call(path, fields, WorkerState, router)
        return sorted(states, key=lambda state: state.worker_id)

    async def blocks(self, router: int | None = None) -> Blocks:
        """What the router believes to be cached."""
        states = await self.state(router, blocks=True)
        return {state.instance_id: frozenset(state.block_hashes) for state in states}

    async def routers(self) -> list[int]:
        """The instances of the router that discovery lists."""
        return await self.caller.instances(f"{self.running.namespace}.router.state")

    async def engines(self) -> list[int]:
        """The instances of the engine that discovery lists."""
        return await self.caller.instances(f"{self.running.namespace}.engine.kv_snapshot")

    async def source(self, instance: int) -> KvSource:
        path = f"{self.running.namespace}.engine.kv_source"
        (source,) = await self.caller.call(path, {}, KvSource, instance)
        return source

    async def snapshot(self, instance: int) -> list[BlockStored]:
        """What an engine has cached, from itself."""
        path = f"{self.running.namespace}.engine.kv_snapshot"
        parts = await self.caller.call(path, {}, KvSnapshotPart, instance)
        assert len({part.seq for part in parts}) == 1
        return [
            event
            for part in parts
            for event in msgspec.msgpack.decode(part.events, type=list[BlockStored])
        ]

    async def engines_blocks(self) -> Blocks:
        """What the engines have cached, from themselves."""
        return {
            instance: frozenset(
                block
                for event in await self.snapshot(instance)
                for block in event.block_hashes
            )
            for instance in await self.engines()
        }  # fmt: skip

    async def wait_ready(self, engines: int = 2) -> None:
        """Wait until the router would choose any of so many engines."""

        async def knows_all() -> bool:
            states = await self.state()
            return [state.state for state in states] == ["ready"] * engines

        await eventually(knows_all)

    async def is_right(self) -> bool:
        """Whether it believes to be cached what is cached; no if a listed engine is gone."""
        believed = await self.blocks()
        try:
            return believed == await self.engines_blocks()
        except RuntimeError:
            return False


class Answer:
    """Who answered, and how much of the prompt was cached there."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.worker: int = document["nvext"]["worker_id"]
        self.prompt_tokens: int = document["usage"]["prompt_tokens"]
        self.cached_tokens: int = document["usage"]["prompt_tokens_details"]["cached_tokens"]


async def ask(client: httpx.AsyncClient, text: str, max_tokens: int = 2) -> Answer:
    """An answer with status 200."""
    response = await client.post(CHAT, json=chat(text, max_tokens=max_tokens, **WORKER))
    assert response.status_code == 200, response.text
    return Answer(response.json())


def prompt(text: str, words: int = 100) -> str:
    """A text of so many words, about as many tokens, that shares no first block with others."""
    return f"{text}: " + " ".join(f"{text}{n}" for n in range(words))


def start_caller(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start it for all tests to come, which a stall of the machine must not cost its lease."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chapter2.runtime_caller"],
        env={**environment, "ETCD_LEASE_TTL": "600"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
