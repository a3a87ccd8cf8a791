"""The frontend component: OpenAI's HTTP API, answered by the processor.

POST /v1/chat/completions and /v1/completions (streamed as server-sent events or whole),
GET /v1/models, /health (503 until the components behind it answer), /live, /metrics, and a chat
page at /. The same chat is served to other components as `frontend.chat_completions`.
"""

import argparse
import asyncio
import importlib.resources
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from common.answer import Answer, json_error
from common.dispatch import dispatch
from common.frontend_metrics import FrontendMetrics
from common.http import http_server, no_route, read_body, unexpected_error
from common.openai import (
    ChatCompletionRequest,
    ChatStream,
    CompletionRequest,
    error_response,
    model_list,
    parse_chat,
    parse_completion,
    request_body_docs,
    to_process_request,
)
from common.protocol import (
    EngineInfo,
    InfoOutput,
    PipelineError,
    ProcessRequest,
    TextOutput,
    from_wire,
    hop_error,
    to_wire,
)
from common.telemetry import log, request_log
from common.worker import ComponentError, Lifecycle, add_common_arguments, run

import msgspec
from dynamo.runtime import Client, Context, DistributedRuntime, dynamo_worker
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

CHAIN_CHECK_S = 0.5
PAGE = importlib.resources.files("common").joinpath("static/index.html")


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    processor = await runtime.endpoint(f"{args.namespace}.processor.process").client()
    processor_info = await runtime.endpoint(f"{args.namespace}.processor.info").client()

    async def chat_completions(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """OpenAI's request in, OpenAI's chunks out, for callers inside the pipeline."""
        try:
            body = {**request, "stream": True} if isinstance(request, dict) else request
            chat = parse_chat(msgspec.json.encode(body))
            events = ChatStream(context.id() or uuid.uuid4().hex, chat)
            async for output in ask_processor(processor, to_process_request(chat), context):
                for event in events.chunk(output).split(b"\n\n"):
                    if event not in (b"", b"data: [DONE]"):
                        yield msgspec.json.decode(event.removeprefix(b"data: "))
        except PipelineError as error:
            yield error_response(error.info)[1]

    async def chain_answers() -> None:
        while True:
            try:
                await engine_info(processor_info, wait=True)
            except PipelineError as error:  # an instance that died is listed for a while
                log.info("waiting: %s", error)
                await asyncio.sleep(CHAIN_CHECK_S)
            else:
                return

    app = build_app(processor, processor_info, life, args)
    try:
        async with http_server(app, args.host, args.port) as server:
            log.info("listening on http://%s:%d", args.host, server.port)
            await life.serve(
                runtime,
                {f"{args.namespace}.frontend.chat_completions": chat_completions},
                ready=chain_answers,
                draining=server.drain,
            )
    except OSError as error:
        raise ComponentError(f"cannot listen on {args.host}:{args.port}: {error}") from error


def build_app(
    processor: Client, processor_info: Client, life: Lifecycle, args: argparse.Namespace
) -> FastAPI:
    """The HTTP API on top of the processor's endpoints."""
    app = FastAPI(
        title="Dynamo pipelines, chapter 1",
        version="1",
        exception_handlers={HTTPException: no_route, Exception: unexpected_error},
    )
    metrics = FrontendMetrics()
    started = int(time.time())

    async def answer(
        http: Request, parse: Callable[[bytes], ChatCompletionRequest | CompletionRequest]
    ) -> Response:
        endpoint = http.url.path.removeprefix("/v1/")
        request_id = uuid.uuid4().hex
        log = request_log(request_id)
        try:
            if metrics.in_flight >= args.max_in_flight:
                limit = f"{args.max_in_flight} requests are in flight; try again later."
                raise PipelineError("overloaded", limit)
            request = parse(await read_body(http, args.max_body_bytes))
        except PipelineError as error:
            log.warning("refused: %s", error)
            response = json_error(error.info, request_id)
            metrics.count(endpoint, response.status_code, error.info.kind)
            return response
        user = f" for user {request.user}" if request.user else ""
        log.info("%s, stream=%s%s", endpoint, bool(request.stream), user)
        context = Context(request_id)
        outputs = ask_processor(processor, to_process_request(request), context)
        return Answer(request, request_id, outputs, context, metrics.start(endpoint))

    @app.post("/v1/chat/completions", openapi_extra=request_body_docs(ChatCompletionRequest))
    async def chat(http: Request) -> Response:
        return await answer(http, parse_chat)

    @app.post("/v1/completions", openapi_extra=request_body_docs(CompletionRequest))
    async def completion(http: Request) -> Response:
        return await answer(http, parse_completion)

    @app.get("/v1/models")
    async def models() -> Response:
        try:
            info = await engine_info(processor_info)
        except PipelineError as error:
            return json_error(error.info, uuid.uuid4().hex)
        return JSONResponse(model_list([info.model], started).model_dump())

    @app.get("/health")
    async def health() -> Response:
        if life.stop.is_set():
            return JSONResponse({"status": "draining"}, 503)
        try:
            info = await engine_info(processor_info)
        except PipelineError as error:
            return JSONResponse({"status": "unavailable", "reason": error.info.message}, 503)
        return JSONResponse({"status": "ready", "engine": to_wire(info)})

    @app.get("/live")
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html")

    return app


async def ask_processor(
    processor: Client, request: ProcessRequest, context: Context
) -> AsyncGenerator[TextOutput, None]:
    """The processor's items; the last one has the finish reason, or this raises.

    A stream is always read to its end: the runtime takes one that was dropped for the sign of
    a broken instance and sends that instance nothing for five seconds.

    Raises:
        PipelineError: the request failed, at any point of the stream.
    """
    last: TextOutput | None = None
    try:
        wire = to_wire(request)
        async for item in dispatch(
            lambda: processor.round_robin(wire, annotated=False, context=context), context
        ):
            output = from_wire(item, TextOutput)
            if output.error is None and output.finish_reason is None:
                yield output
            else:
                last = output
    except PipelineError:
        raise
    except Exception as error:
        raise PipelineError.of(hop_error(error, "processor")) from error
    if last is None:
        raise PipelineError("unavailable", "The processor ended the stream too early.")
    if last.error is not None:
        raise PipelineError.of(last.error)
    yield last


async def engine_info(processor_info: Client, *, wait: bool = False) -> EngineInfo:
    """What the engine at the end of the chain says about itself; `wait` for it to be there."""
    try:
        if wait:
            await processor_info.wait_for_instances()
        stream = await processor_info.round_robin({"wait": wait}, annotated=False)
        replies = [from_wire(item, InfoOutput) async for item in stream]
    except Exception as error:
        raise PipelineError.of(hop_error(error, "processor")) from error
    if replies and replies[0].error is not None:
        raise PipelineError.of(replies[0].error)
    if not replies or replies[0].engine is None:
        raise PipelineError("unavailable", "The processor gave no answer.")
    return replies[0].engine


def parse_args() -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--host", default=env("HOST", "127.0.0.1"), help="(env HOST, %(default)s)")
    parser.add_argument(
        "--port", type=int, default=int(env("PORT", "8000")), help="(env PORT, %(default)s)"
    )
    parser.add_argument(
        "--max-in-flight",
        type=int,
        default=int(env("MAX_IN_FLIGHT", "1024")),
        help="requests answered at once; more get a 429 (env MAX_IN_FLIGHT, %(default)s)",
    )
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=int(env("MAX_BODY_BYTES", str(512 * 1024))),
        help="a longer request gets a 413; NATS carries at most 1 MiB unless configured "
        "otherwise (env MAX_BODY_BYTES, %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(worker, parse_args(), "frontend")
