"""The HTTP answer to one request, sent while the pipeline produces it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, Protocol, TypeVar

from common.frontend_metrics import RequestMetrics
from common.http import client_gone
from common.http_errors import CANCELLED, json_error, outcome
from common.openai import (
    ChatRequest,
    ChatStream,
    CompletionRequest,
    CompletionStream,
    chat_response,
    completion_response,
)
from common.protocol import ErrorInfo, PipelineError, TextOutput
from common.telemetry import request_log

from dynamo.runtime import Context
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

STREAM_END_S = 1.0


Output = TypeVar("Output")


class Encoder(Protocol[Output]):
    """How an answer looks to the client."""

    def chunk(self, output: Output) -> bytes:
        """The server-sent events that tell about `output`; b"" if there is nothing to tell."""

    def is_last(self, output: Output) -> bool: ...

    def failed(self, info: ErrorInfo) -> bytes:
        """The last events of a stream that broke off."""

    def document(self, outputs: list[Output]) -> bytes:
        """The JSON of a whole answer; raises a `PipelineError` if it is none."""


class StreamedAnswer(Response, Generic[Output]):
    """`outputs` as server-sent events if the request asks for a `stream`, else as one document.

    A failure before the first item becomes a status code, a later one an error event. When
    the client closes the connection, `context` is stopped at once, which ends the work in
    every component behind this one. `metrics` are ended here.
    """

    def __init__(
        self,
        encoder: Encoder[Output],
        request_id: str,
        outputs: AsyncIterator[Output],
        context: Context,
        metrics: RequestMetrics,
        *,
        stream: bool,
        end_s: float = STREAM_END_S,
    ) -> None:
        """When the client has left, `outputs` get `end_s` to end by themselves."""
        super().__init__()
        self.end_s = end_s
        self.encoder = encoder
        self.stream = stream
        self.request_id = request_id
        self.outputs = outputs
        self.context = context
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        gone = asyncio.ensure_future(client_gone(receive))
        status: int
        error_kind: str | None
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                status, error_kind = sending.result()
            else:
                status, error_kind = CANCELLED
                request_log(self.request_id).info("the client is gone; cancelled")
                self.context.stop_generating()
                # The stream ends by itself now; to drop it would look like a broken instance.
                await asyncio.wait([sending], timeout=self.end_s)
        except BaseException as error:
            status, error_kind = outcome(error)
            raise
        finally:
            self.context.stop_generating()
            self.metrics.end(status, error_kind)
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> tuple[int, str | None]:
        """Send the answer; returns its status and the kind of its error."""
        try:
            first = await anext(self.outputs)
            if self.stream:
                return 200, await self._send_events(first, send)
            outputs = [first, *[output async for output in self.outputs]]
            response = Response(self.encoder.document(outputs), media_type="application/json")
        except PipelineError as error:
            self._log_failure("failed", error)
            response = json_error(error.info)
            await response(scope, receive, send)
            return response.status_code, error.info.kind
        await response(scope, receive, send)
        return 200, None

    async def _send_events(self, output: Output, send: Send) -> str | None:
        """Send `output` and all that follows; returns the kind of the error that ended it."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        error_kind = None
        try:
            while not self.encoder.is_last(output):
                if event := self.encoder.chunk(output):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                output = await anext(self.outputs)
            last = self.encoder.chunk(output)
        except PipelineError as error:
            self._log_failure("broke off", error)
            last, error_kind = self.encoder.failed(error.info), error.info.kind
        await send({"type": "http.response.body", "body": last})
        return error_kind

    def _log_failure(self, what: str, error: PipelineError) -> None:
        if not self.context.is_stopped():  # else it is the client that broke off
            request_log(self.request_id).warning("%s: %s", what, error)


class Answer(StreamedAnswer[TextOutput]):
    """The answer to a chat or a completion, from the processor's items."""

    def __init__(
        self,
        request: ChatRequest | CompletionRequest,
        request_id: str,
        outputs: AsyncIterator[TextOutput],
        context: Context,
        metrics: RequestMetrics,
    ) -> None:
        encoder = _TextEncoder(request, request_id)
        observed = metrics.observed(outputs)
        super().__init__(
            encoder, request_id, observed, context, metrics, stream=bool(request.stream)
        )


class _TextEncoder:
    def __init__(self, request: ChatRequest | CompletionRequest, request_id: str) -> None:
        self.request = request
        self.request_id = request_id
        self.events = (
            ChatStream(request_id, request)
            if isinstance(request, ChatRequest)
            else CompletionStream(request_id, request)
        )

    def chunk(self, output: TextOutput) -> bytes:
        return self.events.chunk(output)

    def is_last(self, output: TextOutput) -> bool:
        return output.finish_reason is not None

    def failed(self, info: ErrorInfo) -> bytes:
        return self.events.chunk(TextOutput(error=info))

    def document(self, outputs: list[TextOutput]) -> bytes:
        if isinstance(self.request, ChatRequest):
            return chat_response(self.request_id, self.request, outputs)
        return completion_response(self.request_id, self.request, outputs)
