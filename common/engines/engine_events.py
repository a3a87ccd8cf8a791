"""Reads the KV events that an engine of its own process publishes over ZMQ: SGLang, vLLM.

A message has a topic, a sequence number (8 bytes, big-endian, from 0) and a batch. An engine may
also have a socket that sends the last batches again, from a number on: the end is a number of -1.
"""

import asyncio
import logging
from collections.abc import Callable

from common.engines.event_translation import EventTranslation
from common.kv import KvEvent

import msgspec
import zmq
import zmq.asyncio

REPLAY_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 10.0
_END = (-1).to_bytes(8, "big", signed=True)

_log = logging.getLogger(__name__)


class EngineEvents:
    """Belongs to the event loop that it was made on; `run` reads until it is cancelled.

    `address` and `replay` are the sockets' addresses, to connect to. Make it before the engine
    has anything to tell: events are complete from sequence number 0 on.
    """

    def __init__(
        self, address: str, translation: EventTranslation, *, topic: str = "", replay: str = ""
    ) -> None:
        self._translation = translation
        self._replay_address = replay
        self._callbacks: list[Callable[[list[KvEvent]], None]] = []
        self._next = 0  # sequence number
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.rcvhwm = 0  # what waits here is in memory, what does not fit is lost
        self._socket.reconnect_ivl = 20  # ms
        self._socket.linger = 0
        self._socket.subscribe(topic)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.connect(address)

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None:
        self._callbacks.append(callback)

    async def connected(self) -> None:
        """Wait until the engine has accepted the connection.

        Raises:
            TimeoutError: nobody is there.
        """
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self._monitor.recv_multipart()

    async def run(self) -> None:
        """Hand over what comes; a fault of the engine's messages never ends it."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                await self._receive(frames)
            except (ValueError, msgspec.DecodeError) as error:
                self._lost(f"an event cannot be understood ({error})")

    def cleared(self) -> None:
        """The engine has forgotten everything but not said so yet."""
        self._hand_over(self._translation.clear())

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()

    async def _receive(self, frames: list[bytes]) -> None:
        number, payload = _number_and_payload(frames)
        if number > self._next:
            await self._recover(number)
        if number >= self._next:
            self._next = number + 1
            self._hand_over(self._translation.translate(payload))

    async def _recover(self, until: int) -> None:
        """Get what was missed before the batch of number `until`, or forget everything."""
        missing = f"KV events {self._next} to {until - 1} of the engine were missed"
        if not self._replay_address:
            self._next = until
            self._lost(missing)
            return
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                batches = await self._replayed(self._next)
        except TimeoutError:
            batches = {}
        if any(number not in batches for number in range(self._next, until)):
            self._lost(f"{missing}, and the engine no longer has them")
        else:
            _log.info("%s and came again", missing)
        for number in range(self._next, until):
            self._next = number + 1
            if number in batches:
                self._hand_over(self._translation.translate(batches[number]))
        self._next = until

    async def _replayed(self, first: int) -> dict[int, bytes]:
        batches: dict[int, bytes] = {}
        with self._context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self._replay_address)
            await socket.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                frames = await socket.recv_multipart()
                if frames[-2:-1] == [_END]:
                    return batches
                number, payload = _number_and_payload(frames)
                batches[number] = payload

    def _lost(self, reason: str) -> None:
        _log.warning("%s: what it has cached counts as unknown", reason)
        self._hand_over(self._translation.clear())

    def _hand_over(self, events: list[KvEvent]) -> None:
        if events:
            for callback in self._callbacks:
                callback(events)


def _number_and_payload(frames: list[bytes]) -> tuple[int, bytes]:
    if len(frames) < 2 or len(frames[-2]) != 8:
        raise ValueError(f"frames of {[len(frame) for frame in frames]} bytes")
    return int.from_bytes(frames[-2], "big"), frames[-1]
