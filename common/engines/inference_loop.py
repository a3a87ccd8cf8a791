"""The thread that owns llama.cpp: takes requests from a queue and computes step after step."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from common.engines.kv_export import KvExport
from common.engines.llama_context import LlamaContext
from common.engines.sampling import Sampler
from common.engines.scheduled_request import ScheduledRequest
from common.engines.scheduler import Scheduler, Work
from common.kv_transfer.pieces import KvPieces
from common.protocol import EngineMetrics, EngineOutput, PipelineError

from llguidance import LLMatcher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """An item for a request's stream, or why it failed; `kv` goes with one that is handed over."""

    request: ScheduledRequest
    result: EngineOutput | PipelineError
    kv: KvPieces | None = None


class InferenceLoop(threading.Thread):
    """Runs until `stop` or the first failure.

    `load` makes the context and the scheduler, `loaded` says that they are ready, `deliver`
    takes all that one step has produced, and `ended` comes last, with the exception if there
    was a failure. All of them are called on this thread.
    """

    def __init__(
        self,
        worker_id: int,
        load: Callable[[], tuple[LlamaContext, Scheduler]],
        loaded: Callable[[], None],
        deliver: Callable[[list[Delivery]], None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(name=f"engine-{worker_id}", daemon=True)
        self.failed_imports = 0
        self.metrics = EngineMetrics(running=0, waiting=0, used_blocks=0, total_blocks=0)
        self._worker_id = worker_id
        self._load = load
        self._loaded = loaded
        self._deliver = deliver
        self._ended = ended
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._samplers: dict[ScheduledRequest, Sampler] = {}
        self._exports: dict[ScheduledRequest, KvExport] = {}
        self._outbox: list[Delivery] = []

    def submit(self, request: ScheduledRequest, matcher: LLMatcher | None) -> None:
        """Schedule a request; its items, or the reason it is refused, will be delivered."""
        self._commands.put(lambda: self._add(request, matcher))

    def call(self, function: Callable[[], None]) -> None:
        """Run a function between two steps."""
        self._commands.put(function)

    def stop(self) -> None:
        """End after the current step, leaving requests where they are."""

        def stop() -> None:
            self._stopping = True

        self._commands.put(stop)

    def run(self) -> None:
        failure: BaseException | None = None
        try:
            self._context, self._scheduler = self._load()
            self.metrics = self._scheduler.metrics()
            self._loaded()
            try:
                while self._take_commands():
                    self._step()
            finally:
                for sampler in self._samplers.values():
                    sampler.close()
                self._context.close()
        except BaseException as error:
            failure = error
        self._ended(failure)

    def _take_commands(self) -> bool:
        """Do what was asked for; waits when there is nothing to compute. False: stop."""
        if self._scheduler.is_idle:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        return not self._stopping

    def _add(self, request: ScheduledRequest, matcher: LLMatcher | None) -> None:
        try:
            self._scheduler.add(request)
        except PipelineError as error:
            self._outbox.append(Delivery(request, error))
        else:
            self._samplers[request] = Sampler(self._context, request, matcher)

    def _step(self) -> None:
        for request in self._scheduler.drop_stopped():
            self._end(request, request.item(self._worker_id, [], finish_reason="cancelled"))
        work = self._scheduler.plan()
        if work:
            self._scheduler.computed([item for item in work if self._import(item)])
            # What follows a block that could not be imported is not to be computed yet.
            computed = [
                item
                for item in work
                if item.received is None and item.start == len(item.sequence.tokens)
            ]
            ends = [self._fill_batch(item) for item in computed]
            if computed:
                self._context.decode()
                self._scheduler.computed(computed)
                self._export(computed)
            for item, end in zip(computed, ends, strict=True):
                if item.sample:
                    self._sample(item.request, end)
        self._scheduler.cache.publish()
        self.metrics = self._scheduler.metrics()
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)

    def _import(self, work: Work) -> bool:
        """Take over a block of KV that was received, if the work is one and it can be."""
        received = work.request.received
        if work.received is None or not isinstance(received, KvPieces):
            return False
        data, end = received.piece(work.received), work.start + len(work.tokens)
        if not self._context.import_kv(work.sequence.id, work.start, end, data):
            _log.warning("KV from another engine does not fit; computing the prompt instead")
            work.request.received = None  # nor are the blocks after it of any use
            self.failed_imports += 1
            return False
        return True

    def _fill_batch(self, work: Work) -> int:
        """Put the work into the batch; the index there of its last token."""
        position = work.start
        *tokens, last = work.tokens
        for token in tokens:
            self._context.add(token, position, work.sequence.id, logits=False)
            position += 1
        return self._context.add(last, position, work.sequence.id, logits=work.sample)

    def _sample(self, request: ScheduledRequest, index: int) -> None:
        sampler = self._samplers[request]
        try:
            token, logprobs = sampler.sample(index)
        except PipelineError as error:
            self._scheduler.finish(request)
            self._end(request, error)
            return
        reason = self._scheduler.add_output(request, token)
        if reason == "stop":
            item = request.item(self._worker_id, [], finish_reason=reason)
        else:
            reason = "stop" if sampler.is_complete else reason
            entries = None if logprobs is None else [logprobs]
            handed_over = reason is None and request.prefill_only
            item = request.item(self._worker_id, [token], entries, reason, handed_over=handed_over)
        if reason is None and request.prefill_only:
            self._hand_over(request, item)
        elif reason is None:
            self._outbox.append(Delivery(request, item))
        else:
            self._scheduler.finish(request)
            self._end(request, item)

    def _export(self, computed: list[Work]) -> None:
        """Copy the KV out that another engine is to go on with."""
        for item in computed:
            if item.request.prefill_only:
                if item.request not in self._exports:
                    size = self._scheduler.cache.block_size
                    tokens = len(item.request.tokens)
                    self._exports[item.request] = KvExport(self._context, tokens, size)
                self._exports[item.request].copy_computed(item.sequence)

    def _hand_over(self, request: ScheduledRequest, item: EngineOutput) -> None:
        """End a request with which another engine is to go on."""
        kv = self._exports[request].finish(self._scheduler.running[request])
        self._scheduler.finish(request)
        self._end(request, item, kv)

    def _end(
        self,
        request: ScheduledRequest,
        result: EngineOutput | PipelineError,
        kv: KvPieces | None = None,
    ) -> None:
        self._samplers.pop(request).close()
        self._exports.pop(request, None)
        self._outbox.append(Delivery(request, result, kv))
