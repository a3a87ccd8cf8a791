"""A key-value bucket of NATS JetStream: compare-and-set, one clear error when NATS is away.

NATS is where NATS_SERVER says. What is acknowledged has been written to the server's store.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from common.errors import ComponentError
from common.protocol import PipelineError
from common.server_addresses import server_addresses
from common.telemetry import log

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

T = TypeVar("T")

CONNECT_S = 10.0
ANSWER_S = 3.0  # the longest that an operation takes: to reconnect, and to be answered
RECONNECT_S = 1
PING_S = 5  # a server that answers none of two in a row is connected to anew
OVERHEAD = 4096  # of max_payload: subject, headers
FULL_S = 60.0  # when trying again may help: somebody must have deleted something
STORE_FULL = (10047, 10077)  # no room for the message in the account, in the stream
MISSING = (nats.errors.NoRespondersError, nats.js.errors.NoStreamResponseError)
OTHER_SETTINGS = 10058  # the stream exists, but not like this


class Entry(NamedTuple):
    """A value and the revision at which it was written."""

    value: bytes
    revision: int


class Bucket:
    """One bucket. Every method raises `PipelineError`, kind `unavailable`, when NATS is away."""

    def __init__(
        self,
        client: Client,
        kv: KeyValue,
        connected: asyncio.Event,
        make: Callable[[], Awaitable[KeyValue]],
    ) -> None:
        self._client = client
        self._kv = kv
        self._connected = connected
        self._make = make

    @property
    def max_value(self) -> int:
        """The largest value in bytes that NATS takes."""
        return self._client.max_payload - OVERHEAD

    async def get(self, key: str) -> Entry | None:
        try:
            entry = await self._answer(lambda: self._kv.get(key))
        except nats.js.errors.KeyNotFoundError:
            return None
        return Entry(entry.value or b"", entry.revision or 0)

    async def create(self, key: str, value: bytes) -> int | None:
        """The revision, or None: there is such a key."""
        return await self._set(lambda: self._kv.create(key, value))

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        """The new revision, or None: the key's is another one than `revision`."""
        return await self._set(lambda: self._kv.update(key, value, last=revision))

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Whether the key is gone; of another revision than the given one it is not."""
        try:
            return await self._answer(lambda: self._kv.delete(key, last=revision))
        except nats.js.errors.APIError as error:
            if _is_wrong_revision(error):
                return False
            raise

    async def _set(self, write: Callable[[], Awaitable[int]]) -> int | None:
        try:
            return await self._answer(write)
        except nats.js.errors.APIError as error:
            if _is_wrong_revision(error):
                return None
            raise

    async def _answer(self, operation: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._connected.wait()
                try:
                    return await operation()
                except MISSING:  # NATS has restarted without what it had stored
                    self._kv = await self._make()
                    return await operation()
        except (TimeoutError, nats.errors.Error, OSError) as error:
            raise _failure(error) from error


def _is_wrong_revision(error: nats.js.errors.APIError) -> bool:
    return isinstance(error, nats.js.errors.KeyWrongLastSequenceError) or error.err_code == 10071


def _failure(error: Exception) -> Exception:
    if isinstance(error, nats.js.errors.KeyNotFoundError):
        return error
    if isinstance(error, nats.js.errors.APIError):
        if _is_wrong_revision(error):
            return error
        if error.err_code in STORE_FULL:
            message = "The store of sessions and notes is full; delete some, or store nothing."
            return PipelineError("overloaded", message, retry_after_s=FULL_S)
    reason = str(error) or "no answer"
    return PipelineError("unavailable", f"The store in NATS is unavailable: {reason}")


@asynccontextmanager
async def open_bucket(name: str, *, ttl_s: float, max_bytes: int | None) -> AsyncIterator[Bucket]:
    """The bucket of that name, made if there is none; a key is forgotten `ttl_s` after a write.

    Of several components with different settings, the last one to start decides.

    Raises:
        ComponentError: NATS does not answer, refuses us, or has no JetStream.
    """
    [(url, (host, port))] = server_addresses("NATS_SERVER").items()
    where = f"NATS at {host}:{port}"
    user, password, token = _credentials(url)
    client, connected = Client(), asyncio.Event()
    last_error: list[Exception] = []

    async def on_error(error: Exception) -> None:
        # A refused connection may be reset before its reason is read: an earlier one says more.
        if not (last_error and isinstance(error, OSError)):
            last_error[:] = [error]
        log.debug("%s: %s", where, error)

    async def on_disconnected() -> None:
        if not client.is_closed:
            log.warning("lost the connection to %s", where)
        connected.clear()

    async def on_reconnected() -> None:
        log.info("connected to %s again", where)
        connected.set()

    async def make() -> KeyValue:
        return await _key_value(client.jetstream(timeout=ANSWER_S), name, ttl_s, max_bytes)

    try:
        try:
            async with asyncio.timeout(CONNECT_S):
                await client.connect(
                    _without_credentials(url),
                    user=user,
                    password=password,
                    token=token,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RECONNECT_S,
                    ping_interval=PING_S,
                    error_cb=on_error,
                    disconnected_cb=on_disconnected,
                    reconnected_cb=on_reconnected,
                )
                connected.set()
                kv = await make()
        except (TimeoutError, nats.errors.Error, OSError) as error:
            raise _cannot_start(where, last_error[0] if last_error else error) from error
        yield Bucket(client, kv, connected, make)
    finally:
        connected.clear()
        with suppress(nats.errors.Error, OSError):
            await client.close()


def _cannot_start(where: str, error: Exception) -> ComponentError:
    missing = (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError)
    if isinstance(error, missing):
        return ComponentError(f"{where} has no JetStream, which keeps sessions: start it with -js")
    return ComponentError(f"{where}: {str(error) or 'no answer'}")


async def _key_value(
    context: JetStreamContext, name: str, ttl_s: float, max_bytes: int | None
) -> KeyValue:
    try:
        return await context.create_key_value(
            bucket=name, ttl=ttl_s, max_bytes=max_bytes or -1, direct=True
        )
    except nats.js.errors.BadRequestError as error:
        if error.err_code != OTHER_SETTINGS:
            raise
    kv = await context.key_value(name)
    config = (await kv.status()).stream_info.config
    window = min(config.duplicate_window or ttl_s, ttl_s)
    await context.update_stream(
        config, max_age=ttl_s, max_bytes=max_bytes or -1, duplicate_window=window
    )
    return kv


def _credentials(url: str) -> tuple[str | None, str | None, str | None]:
    """User, password and token, from `user:password@` or `token@` as clients of NATS read it."""
    parts = urlsplit(url)
    if parts.username is None:
        return None, None, None
    if parts.password is None:
        return None, None, unquote(parts.username)
    return unquote(parts.username), unquote(parts.password), None


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
