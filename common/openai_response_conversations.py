"""Conversations at the API: the body that creates one, the object, what the routes answer.

Source: https://platform.openai.com/docs/api-reference/conversations.
"""

from typing import Any, Literal

from common.openai_docs import document_docs
from common.openai_fields import StrictModel, parse
from common.openai_response_requests import Metadata
from common.openai_response_unsupported import CONVERSATION
from common.protocol_agent import StoredConversation

import msgspec


class ConversationRequest(StrictModel):
    """The body of POST /v1/conversations; what is said first is the first request's `input`."""

    unsupported = CONVERSATION

    metadata: Metadata = None


def parse_conversation(body: bytes) -> ConversationRequest:
    """The request in `body`, which may be empty; raises as `openai_fields.parse` does."""
    return parse(ConversationRequest, body or b"{}")


class ConversationDocument(msgspec.Struct):
    """A conversation; `created_at` is in seconds since 1970."""

    id: str
    created_at: int
    metadata: dict[str, str]
    object: Literal["conversation"] = "conversation"


class DeletedConversation(msgspec.Struct):
    """The body of DELETE /v1/conversations/{id}."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True


def conversation_document(stored: StoredConversation) -> dict[str, Any]:
    """The body of GET /v1/conversations/{id}."""
    document = ConversationDocument(stored.id, stored.created, stored.metadata)
    return dict(msgspec.to_builtins(document))


_SCHEMA = msgspec.json.schema(ConversationDocument)
CREATED_CONVERSATIONS = document_docs(_SCHEMA, 400, 403, 408, 413, 429, 500, 503)
CONVERSATION_RESPONSES = document_docs(_SCHEMA, 400, 404, 500, 503)
DELETED_CONVERSATIONS = document_docs(
    msgspec.json.schema(DeletedConversation), 400, 403, 404, 409, 500, 503
)
