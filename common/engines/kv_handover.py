"""An engine's ends of a handover: KV that it gives away, and KV that it need not compute."""

import asyncio
import contextlib
import logging

from common.engines.block_cache import BlockCache
from common.engines.scheduled_request import ScheduledRequest
from common.kv import block_hashes
from common.kv_transfer.errors import KvTransferError
from common.kv_transfer.pieces import KvPieces
from common.kv_transfer.start import KvTransfer
from common.protocol import GenerateRequest, PipelineError
from common.protocol_transfer import MAX_RECEIVED, KvDescriptor
from common.waiting import first_of

__all__ = ["MAX_RECEIVED", "NOT_LENT", "KvHandover"]

_log = logging.getLogger(__name__)

NOT_LENT = "none"  # the kind of a descriptor that leaves everything to be computed again
RELEASE_S = 0.5  # nobody's answer waits longer for a courtesy


class KvHandover:
    """For one event loop; without a `transfer` nothing is given away, and nothing comes.

    `model` names weights and their quantisation: another file's KV is of no use.
    """

    def __init__(self, transfer: KvTransfer | None, model: str) -> None:
        self.failed = 0
        self._fetching: set[asyncio.Task[KvPieces | None]] = set()
        self._transfer = transfer
        self._model = model
        self._room = asyncio.Semaphore(MAX_RECEIVED)
        self._holding: set[ScheduledRequest] = set()

    @property
    def fetching(self) -> int:
        """How many requests wait for their KV."""
        return len(self._fetching)

    def check(self, request: GenerateRequest) -> None:
        """Refuse what this engine cannot do.

        Raises:
            PipelineError: kind `invalid_request`.
        """
        if request.prefill_only and self._transfer is None:
            message = "this engine gives no KV away; start it with --role prefill"
            raise PipelineError("invalid_request", message, "prefill_only")

    def lend(self, request: ScheduledRequest, pieces: KvPieces) -> KvDescriptor:
        """Keep the KV for another engine to fetch."""
        assert self._transfer is not None  # noqa: S101 (`check` has refused the request)
        if request.is_stopped():
            return KvDescriptor(NOT_LENT, 0)  # nobody will come for it
        descriptor = self._transfer.lender.lend(pieces)
        if descriptor is None:
            _log.warning("no room to keep %d bytes of KV for another engine", pieces.size)
            return KvDescriptor(NOT_LENT, 0)
        descriptor.model = self._model
        return descriptor

    async def receive(self, request: ScheduledRequest, kv: KvDescriptor, cache: BlockCache) -> None:
        """Fetch what is not cached here into `request.received`, or leave it to be computed.

        `done` must follow.
        """
        fetching = asyncio.create_task(self._fetch(request, kv, cache))
        self._fetching.add(fetching)
        fetching.add_done_callback(self._fetching.discard)
        try:
            await first_of(asyncio.wait([fetching]), request.context.async_killed_or_stopped())
            if fetching.done() and not fetching.cancelled():  # else nobody wants it any more
                request.received = fetching.result()
        except Exception as error:  # whatever it is: the prompt can be computed
            self.failed += 1
            cause = None if isinstance(error, KvTransferError) else error
            _log.warning(
                "computing %d tokens after all: %s", len(request.tokens), error, exc_info=cause
            )
        finally:
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)

    def done(self, request: ScheduledRequest) -> None:
        """The request has taken over what it had received, or never will."""
        if request in self._holding:
            self._holding.remove(request)
            self._room.release()

    def close(self) -> None:
        """End what is being fetched."""
        for fetching in self._fetching:
            fetching.cancel()

    async def _fetch(
        self, request: ScheduledRequest, kv: KvDescriptor, cache: BlockCache
    ) -> KvPieces | None:
        if self._transfer is None:
            raise KvTransferError("this engine takes no KV; start it with --role decode")
        if kv.kind == NOT_LENT:
            raise KvTransferError("the other engine had no room to keep it")
        if kv.model != self._model:
            raise KvTransferError(f"it is of the model {kv.model!r}, not of {self._model!r}")
        if not 0 < kv.tokens < len(request.tokens):
            raise KvTransferError(f"it is of {kv.tokens} tokens, not of {len(request.tokens) - 1}")
        await self._room.acquire()
        self._holding.add(request)
        # Read beside the thread that changes it: a block too many or too few is found out when
        # the request starts, and only costs time.
        size = cache.block_size
        cached = len(cache.match(request.tokens, block_hashes(request.tokens, size)))
        if cached * size >= kv.tokens:
            with contextlib.suppress(KvTransferError, TimeoutError):  # then it expires
                async with asyncio.timeout(RELEASE_S):
                    await self._transfer.borrower.release(kv)
            return None
        pieces = await self._transfer.borrower.fetch(kv, cached)
        if (pieces.first, pieces.end, pieces.tokens) != (cached, -(-kv.tokens // size), kv.tokens):
            raise KvTransferError(f"its blocks are not of {size} tokens")
        return pieces
