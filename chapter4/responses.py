"""The routes of the agent's runs: POST /v1/responses, what is stored of them, the page /agent."""

import argparse
import importlib.resources
import time
from collections.abc import AsyncIterator

from chapter4.agent_client import Agent, ask_agent, delete_stored, stored_response
from chapter4.hints import (
    RoutedResponseRequest,
    hinted_request_docs,
    parse_response_request,
    routing_hints,
)
from common.answer import StreamedAnswer
from common.frontend_metrics import FrontendMetrics
from common.http_errors import outcome
from common.http_requests import read_body, refuse_other_parameters, refuse_other_sites
from common.openai_response_agent import asked_of, response_id_of, to_agent_request
from common.openai_response_docs import (
    DELETED_RESPONSES,
    ITEM_LIST_RESPONSES,
    RESPONSE_RESPONSES,
    STORED_RESPONSES,
    DeletedResponse,
)
from common.openai_response_lists import LIST_QUERY_DOCS, input_items, list_query, page_of
from common.openai_response_output import stored_document
from common.openai_response_stream import ResponseStream
from common.protocol import to_wire
from common.protocol_agent import AgentEvent, StoredQuery
from common.telemetry import request_log

from dynamo.runtime import Context
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

RUN_END_S = 10.0  # a run that is stopped ends its tools first
PAGE = importlib.resources.files("chapter4").joinpath("static/agent.html")


def add_responses(
    app: FastAPI, agent: Agent, metrics: FrontendMetrics, args: argparse.Namespace
) -> None:
    """Add the routes to `app`; the agent answers them."""

    @app.post(
        "/v1/responses",
        openapi_extra=hinted_request_docs(RoutedResponseRequest),
        responses=RESPONSE_RESPONSES,
    )
    async def respond(http: Request) -> Response:
        request_id: str = http.state.request_id
        measured = metrics.start("responses", args.max_in_flight)
        try:
            refuse_other_sites(http)
            body = await read_body(http, args.max_body_bytes, args.body_timeout)
            request = parse_response_request(body)
            asked = asked_of(request, int(time.time()))
            hints = routing_hints(request, http.headers)
            task = to_agent_request(request, response_id_of(request_id), asked, hints)
            request_log(request_id).debug("responses, stream=%s", bool(request.stream))
            context = Context(request_id)
            steps = bool(request.nvext and request.nvext.extra_fields)
            stream = ResponseStream(task, asked, steps=steps)
            planned = request.nvext is not None and request.nvext.agent == "planner"
            runs = agent.planner if planned else agent.run
            events: AsyncIterator[AgentEvent] = ask_agent(runs, task, request, context)
            return StreamedAnswer(  # it ends `measured`
                stream,
                request_id,
                measured.observed_run(events),
                context,
                measured,
                stream=bool(request.stream),
                end_s=RUN_END_S,
            )
        except BaseException as error:
            measured.end(*outcome(error))
            raise

    @app.get("/agent", include_in_schema=False)
    async def page() -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html")

    # What belongs to a user is there only for who names that user.
    @app.get("/v1/responses/{response_id}", responses=STORED_RESPONSES)
    async def get_response(http: Request, response_id: str, user: str = "") -> Response:
        refuse_other_parameters(http, "user")
        found = await stored_response(agent.get_response, StoredQuery(response_id, user))
        return JSONResponse(stored_document(found))

    @app.delete("/v1/responses/{response_id}", responses=DELETED_RESPONSES)
    async def delete_response(http: Request, response_id: str, user: str = "") -> Response:
        refuse_other_sites(http)
        refuse_other_parameters(http, "user")
        await delete_stored(agent.delete_response, StoredQuery(response_id, user))
        return JSONResponse(to_wire(DeletedResponse(response_id)))

    @app.get(
        "/v1/responses/{response_id}/input_items",
        openapi_extra=LIST_QUERY_DOCS,
        responses=ITEM_LIST_RESPONSES,
    )
    async def get_input_items(http: Request, response_id: str) -> Response:
        query = list_query(http.query_params.multi_items())
        whose = StoredQuery(response_id, query.user or "")
        found = await stored_response(agent.get_response, whose)
        return JSONResponse(to_wire(page_of(input_items(found, query.include or []), query)))
