"""Lists of items: what a stored response was asked, and all that a conversation has.

Source: https://platform.openai.com/docs/api-reference/responses/input-items and
`/conversations/list-items`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from common.openai_fields import StrictModel, parse
from common.openai_response_objects import OutputItem
from common.openai_response_output import OutputItems, asked_in
from common.openai_response_requests import Includable
from common.openai_values import Label
from common.protocol import PipelineError
from common.protocol_agent import FunctionOutputItem, MessageItem, StoredResponse

import msgspec
from msgspec.structs import replace
from pydantic import Field

MAX_LIMIT = 100


class ListQuery(StrictModel):
    """The query of the routes that list items."""

    order: Annotated[Literal["asc", "desc"], Field(description="asc or desc, the default")] = "desc"
    limit: Annotated[
        int, Field(ge=1, le=MAX_LIMIT, description=f"1 to {MAX_LIMIT}, default 20")
    ] = 20
    after: Annotated[Label | None, Field(description="the id of the last item before these")] = None
    include: Annotated[
        list[Includable] | None, Field(alias="include[]", description="as in the request's include")
    ] = None
    user: Annotated[Label | None, Field(description="whose it is, if it is somebody's")] = None


LIST_QUERY_DOCS: dict[str, Any] = {
    "parameters": [
        {"name": field.alias or name, "in": "query", "required": False, "schema": schema}
        for name, field in ListQuery.model_fields.items()
        for schema in [ListQuery.model_json_schema()["properties"][field.alias or name]]
    ]
}


def list_query(parameters: Iterable[tuple[str, str]]) -> ListQuery:
    """The query that has these parameters; raises as `openai_fields.parse` does."""
    fields: dict[str, Any] = {}
    for name, value in parameters:
        if name in ("include", "include[]"):
            fields.setdefault("include[]", []).append(value)
        elif name in fields:
            message = f"'{name}': Given twice."
            raise PipelineError("invalid_request", message, name)
        else:
            is_number = name == "limit" and re.fullmatch("[0-9]{1,9}", value)
            fields[name[:80]] = int(value) if is_number else value
    return parse(ListQuery, msgspec.json.encode(fields))


class InputText(msgspec.Struct, tag="input_text", tag_field="type"):
    text: str


class InputMessageItem(msgspec.Struct, tag="message", tag_field="type"):
    """A message that is not the model's; the model's is an `OutputMessage`."""

    id: str
    role: Literal["user", "system"]
    content: list[InputText]
    status: Literal["completed"] = "completed"


class FunctionOutput(msgspec.Struct, tag="function_call_output", tag_field="type"):
    id: str
    call_id: str
    output: str
    status: Literal["completed"] = "completed"


InputListItem = InputMessageItem | FunctionOutput
ListedItem = InputListItem | OutputItem


class ItemList(msgspec.Struct):
    """A page of a list; of an empty one the ids are ""."""

    data: list[Any]
    first_id: str
    last_id: str
    has_more: bool
    object: Literal["list"] = "list"


def input_items(stored: StoredResponse, include: Sequence[str]) -> list[ListedItem]:
    """What was asked, in its order. The ids are ours: a client need not have given any."""
    made = _output_items(stored, include)
    items: list[ListedItem] = []
    for index, item in enumerate(stored.input):
        one: ListedItem
        match item:
            case MessageItem(role="user" | "system" as role):
                one = InputMessageItem("msg_", role, [InputText(item.content)])
            case FunctionOutputItem():
                one = FunctionOutput("fco_", item.call_id, item.output)
            case _:
                one = made.done(index, item)
        kind = one.id.partition("_")[0]
        one.id = f"{kind}_{stored.id.removeprefix('resp_')}_in{index}"
        items.append(one)
    return items


def conversation_items(turns: Sequence[StoredResponse], include: Sequence[str]) -> list[ListedItem]:
    """All that was asked and made of it, oldest first; output has the ids that its response had."""
    items: list[ListedItem] = []
    for turn in turns:
        made = _output_items(turn, include)
        output = [made.done(index, item) for index, item in enumerate(turn.output)]
        items += [*input_items(turn, include), *output]
    return items


def page_of(items: Sequence[ListedItem], query: ListQuery) -> ItemList:
    """The part of the list, oldest first, that the query asks for.

    Raises:
        PipelineError: kind `invalid_request`: no item has the id that it names.
    """
    ordered = list(items if query.order == "asc" else reversed(items))
    start = 0
    if query.after is not None:
        ids = [item.id for item in ordered]
        if query.after not in ids:
            message = f"'after': There is no item {query.after[:80]!r}."
            raise PipelineError("invalid_request", message, "after")
        start = ids.index(query.after) + 1
    found = ordered[start : start + query.limit]
    first, last = (found[0].id, found[-1].id) if found else ("", "")
    return ItemList(found, first, last, has_more=start + len(found) < len(ordered))


def _output_items(stored: StoredResponse, include: Sequence[str]) -> OutputItems:
    asked = replace(asked_in(stored), include=list(include))
    return OutputItems(stored.id, asked)
