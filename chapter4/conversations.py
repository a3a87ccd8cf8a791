"""The routes of conversations: POST /v1/conversations, what is stored of one, its items.

What belongs to a user is there only for who names that user.
"""

import argparse

from chapter4.agent_client import Agent, delete_stored, stored_conversation, stored_turns
from common.http_requests import read_body, refuse_other_parameters, refuse_other_sites
from common.openai_docs import request_body_docs
from common.openai_response_conversations import (
    CONVERSATION_RESPONSES,
    CREATED_CONVERSATIONS,
    DELETED_CONVERSATIONS,
    ConversationRequest,
    DeletedConversation,
    conversation_document,
    parse_conversation,
)
from common.openai_response_docs import ITEM_LIST_RESPONSES
from common.openai_response_lists import LIST_QUERY_DOCS, conversation_items, list_query, page_of
from common.protocol import to_wire
from common.protocol_agent import NewConversation, StoredQuery

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response


def add_conversations(app: FastAPI, agent: Agent, args: argparse.Namespace) -> None:
    """Add the routes to `app`; the agent answers them."""

    @app.post(
        "/v1/conversations",
        openapi_extra=request_body_docs(ConversationRequest),
        responses=CREATED_CONVERSATIONS,
    )
    async def create(http: Request, user: str = "") -> Response:
        refuse_other_sites(http)
        refuse_other_parameters(http, "user")
        body = await read_body(http, args.max_body_bytes, args.body_timeout)
        new = NewConversation(user, parse_conversation(body).metadata or {})
        made = await stored_conversation(agent.create_conversation, new)
        return JSONResponse(conversation_document(made))

    @app.get("/v1/conversations/{conversation}", responses=CONVERSATION_RESPONSES)
    async def get(http: Request, conversation: str, user: str = "") -> Response:
        refuse_other_parameters(http, "user")
        query = StoredQuery(conversation, user)
        return JSONResponse(
            conversation_document(await stored_conversation(agent.get_conversation, query))
        )

    @app.get(
        "/v1/conversations/{conversation}/items",
        openapi_extra=LIST_QUERY_DOCS,
        responses=ITEM_LIST_RESPONSES,
    )
    async def items(http: Request, conversation: str) -> Response:
        query = list_query(http.query_params.multi_items())
        turns = await stored_turns(agent.get_turns, StoredQuery(conversation, query.user or ""))
        found = page_of(conversation_items(turns, query.include or []), query)
        return JSONResponse(to_wire(found))

    @app.delete("/v1/conversations/{conversation}", responses=DELETED_CONVERSATIONS)
    async def delete(http: Request, conversation: str, user: str = "") -> Response:
        refuse_other_sites(http)
        refuse_other_parameters(http, "user")
        await delete_stored(agent.delete_conversation, StoredQuery(conversation, user))
        return JSONResponse(to_wire(DeletedConversation(conversation)))
