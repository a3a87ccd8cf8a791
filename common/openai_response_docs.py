"""What the routes of POST /v1/responses and its like answer, for the OpenAPI document."""

from typing import Literal

from common.openai_docs import answer_docs, document_docs
from common.openai_response_lists import ItemList
from common.openai_response_objects import ResponseObject

import msgspec


class DeletedResponse(msgspec.Struct):
    """The body of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


_EVENTS = (
    "An event of the response as JSON, as OpenAI's API has it, the last one `response.completed`, "
    "`response.incomplete` or `response.failed`."
)
_SCHEMA = msgspec.json.schema(ResponseObject)

RESPONSE_RESPONSES = answer_docs(_SCHEMA, _EVENTS, 400, 403, 404, 408, 409, 413, 429, 500, 503)
STORED_RESPONSES = document_docs(_SCHEMA, 400, 404, 500, 503)
DELETED_RESPONSES = document_docs(
    msgspec.json.schema(DeletedResponse), 400, 403, 404, 409, 500, 503
)
ITEM_LIST_RESPONSES = document_docs(msgspec.json.schema(ItemList), 400, 404, 500, 503)
