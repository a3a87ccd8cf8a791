"""The frontend component: OpenAI's HTTP API, answered by the processor and the agent.

POST /v1/chat/completions, /v1/completions and /v1/responses (streamed as server-sent events or
whole), what is stored of responses, /v1/conversations, GET /v1/models and /v1/models/{id}, /health
(503 until the components behind it answer), /live, /metrics, a chat page at / and the router's page
at /router. Other components get the same chat as `frontend.chat_completions`.
"""

import argparse
import asyncio
import contextlib
import importlib.resources
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from chapter4.agent_client import Agent
from chapter4.conversations import add_conversations
from chapter4.hints import (
    RoutedChatRequest,
    RoutedCompletionRequest,
    hinted_request_docs,
    parse_chat,
    parse_completion,
    routing_hints,
)
from chapter4.processor_client import ask_processor, engine_info, migration_counter
from chapter4.responses import add_responses
from chapter4.router_page import RouterPage
from common.answer import Answer
from common.frontend_metrics import FrontendMetrics
from common.http import http_server, listen
from common.http_arguments import add_http_arguments
from common.http_errors import EXCEPTION_HANDLERS, outcome
from common.http_requests import guarded, read_body, refuse_other_sites
from common.openai import (
    CHAT_RESPONSES,
    COMPLETION_RESPONSES,
    MODEL_LIST_RESPONSES,
    MODEL_RESPONSES,
    ChatStream,
    error_response,
    model_document,
    model_list,
)
from common.protocol import PipelineError, to_wire
from common.telemetry import log, request_log
from common.worker import ComponentError, Lifecycle, add_common_arguments, run

import msgspec
from dynamo.runtime import Client, Context, DistributedRuntime, dynamo_worker
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import Counter
from starlette.types import ASGIApp

CHAIN_CHECK_S = 0.5
PAGE = importlib.resources.files("common").joinpath("static/index.html")


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    processor = await runtime.endpoint(f"{args.namespace}.processor.process").client()
    processor_info = await runtime.endpoint(f"{args.namespace}.processor.info").client()
    agent = await Agent.of(runtime, args.namespace)
    router_watch = await runtime.endpoint(f"{args.namespace}.router.watch").client()
    metrics = FrontendMetrics()
    migrations = migration_counter(metrics.registry)

    async def chat_completions(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """OpenAI's request in, OpenAI's chunks out, for callers inside the pipeline."""
        endpoint, limit = "frontend.chat_completions", args.max_in_flight
        try:
            with metrics.request(endpoint, limit, context) as measured:
                body = {**request, "stream": True} if isinstance(request, dict) else request
                chat = parse_chat(msgspec.json.encode(body))
                events = ChatStream(context.id() or uuid.uuid4().hex, chat)
                hints = routing_hints(chat)
                outputs = ask_processor(processor, chat, hints, context, migrations)
                async for output in measured.observed(outputs):
                    for event in events.chunk(output).split(b"\n\n"):
                        if event not in (b"", b"data: [DONE]"):
                            yield msgspec.json.decode(event.removeprefix(b"data: "))
        except PipelineError as error:
            yield error_response(error.info)[1]

    async def chain_answers() -> None:
        await processor.wait_for_instances()  # each endpoint has a watch of its own
        await agent.wait_for_instances()
        while True:
            try:
                await engine_info(processor_info, wait=True)
                await agent.check_answers()
                return
            except PipelineError as error:  # an instance that died is listed for a while
                log.info("waiting: %s", error)
                await asyncio.sleep(CHAIN_CHECK_S)

    try:
        listener = listen(args.host, args.port)
    except OSError as error:
        raise ComponentError(f"cannot listen on {args.host}:{args.port}: {error}") from error
    router_page = RouterPage(router_watch)
    app = build_app(processor, processor_info, agent, router_page, metrics, migrations, life, args)

    async def drain() -> None:
        await router_page.aclose()
        await server.drain()

    async with contextlib.aclosing(router_page), http_server(app, listener) as server:
        log.info("listening on %s", server.url)
        await life.serve(
            runtime,
            {f"{args.namespace}.frontend.chat_completions": chat_completions},
            ready=chain_answers,
            draining=drain,
        )


def build_app(
    processor: Client,
    processor_info: Client,
    agent: Agent,
    router_page: RouterPage,
    metrics: FrontendMetrics,
    migrations: Counter,
    life: Lifecycle,
    args: argparse.Namespace,
) -> ASGIApp:
    """The HTTP API on top of the processor's and the agent's endpoints."""
    app = FastAPIOffline(
        title="Dynamo pipelines, chapter 4", version="1", exception_handlers=EXCEPTION_HANDLERS
    )
    started = int(time.time())

    async def answer(
        http: Request, parse: Callable[[bytes], RoutedChatRequest | RoutedCompletionRequest]
    ) -> Response:
        endpoint = http.url.path.removeprefix("/v1/")
        request_id: str = http.state.request_id
        measured = metrics.start(endpoint, args.max_in_flight)
        try:
            refuse_other_sites(http)
            request = parse(await read_body(http, args.max_body_bytes, args.body_timeout))
            user = f" for user {request.user}" if request.user else ""
            request_log(request_id).debug("%s, stream=%s%s", endpoint, bool(request.stream), user)
            hints = routing_hints(request, http.headers)
            context = Context(request_id)
            outputs = ask_processor(processor, request, hints, context, migrations)
            return Answer(request, request_id, outputs, context, measured)  # it ends `measured`
        except BaseException as error:
            measured.end(*outcome(error))
            raise

    @app.post(
        "/v1/chat/completions",
        openapi_extra=hinted_request_docs(RoutedChatRequest),
        responses=CHAT_RESPONSES,
    )
    async def chat(http: Request) -> Response:
        return await answer(http, parse_chat)

    @app.post(
        "/v1/completions",
        openapi_extra=hinted_request_docs(RoutedCompletionRequest),
        responses=COMPLETION_RESPONSES,
    )
    async def completion(http: Request) -> Response:
        return await answer(http, parse_completion)

    @app.get("/v1/models", responses=MODEL_LIST_RESPONSES)
    async def models() -> Response:
        info = await engine_info(processor_info)
        return JSONResponse(model_list(info, started).model_dump())

    @app.get("/v1/models/{model_id:path}", responses=MODEL_RESPONSES)
    async def model(model_id: str) -> Response:
        info = await engine_info(processor_info)
        return JSONResponse(model_document(info, model_id, started).model_dump())

    @app.get("/health")
    async def health() -> Response:
        if life.stop.is_set():
            return JSONResponse({"status": "draining"}, 503)
        try:
            info = await engine_info(processor_info)
            if not agent.run.instance_ids():
                raise PipelineError("unavailable", "No agent is listed.")
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

    add_responses(app, agent, metrics, args)
    add_conversations(app, agent, args)
    router_page.add_to(app)
    return guarded(app, args.host, args.allowed_host)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    add_http_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run(worker, parse_args(), "frontend")
