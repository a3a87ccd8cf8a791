"""Lists of what is stored: which part of it a query asks for, and what each item looks like."""

from typing import Any

from common.openai_response_lists import (
    ItemList,
    ListQuery,
    conversation_items,
    input_items,
    list_query,
    page_of,
)
from common.openai_response_output import stored_document
from common.protocol import PipelineError, Usage
from common.protocol_agent import MessageItem, StoredResponse, ToolRunItem

import pytest


def turn(number: int, **fields: Any) -> StoredResponse:
    fields.setdefault("output", [MessageItem("assistant", f"re: {number}")])
    return StoredResponse(
        id=f"resp_{number}",
        session="conv_1",
        created=number,
        model="m",
        status="completed",
        usage=Usage(1, 1),
        input=[MessageItem("user", str(number))],
        **fields,
    )


TURNS = [turn(number) for number in range(5)]


def page(**fields: Any) -> ItemList:
    return page_of(conversation_items(TURNS, []), ListQuery(**fields))


def test_pages_come_to_the_whole_list() -> None:
    whole = [item.id for item in page(order="asc").data]
    assert len(set(whole)) == 10
    for order, expected in (("asc", whole), ("desc", whole[::-1])):
        got: list[str] = []
        after = None
        while True:
            part = page(order=order, limit=3, after=after)
            got += [item.id for item in part.data]
            assert (part.first_id, part.last_id) == (part.data[0].id, part.data[-1].id)
            if not part.has_more:
                break
            after = part.last_id
        assert got == expected


def test_after_the_last_one_there_is_none() -> None:
    last = page(order="asc").last_id
    assert page(order="asc", after=last) == ItemList([], "", "", has_more=False)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ([("limit", "0")], "limit"),
        ([("limit", "1e1")], "limit"),
        ([("limit", "٣")], "limit"),
        ([("limit", "9" * 5000)], "limit"),
        ([("order", "")], "order"),
        ([("after", "")], "after"),
        ([("after", "a"), ("after", "b")], "after"),
        ([("before", "a")], "before"),
        ([("include[]", "logprobs")], "include[][0]"),
    ],
)
def test_what_a_query_cannot_say(parameters: list[tuple[str, str]], param: str) -> None:
    with pytest.raises(PipelineError) as caught:
        list_query(parameters)
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", param)


def test_a_query() -> None:
    kinds = ["code_interpreter_call.outputs", "file_search_call.results"]
    included = [("include[]", kinds[0]), ("include", kinds[1])]
    query = list_query([("limit", "7"), ("order", "asc"), ("user", "ann"), *included])
    assert (query.limit, query.order, query.user, query.after) == (7, "asc", "ann", None)
    assert query.include == kinds


def test_a_run_that_another_component_asked_for_is_listed_too() -> None:
    """The agent's endpoint is for all; who asks it directly has no HTTP request to repeat."""
    run = ToolRunItem("call_1", "builtin", "python", '{"code": "1"}', "1\n")
    stored = turn(1, output=[run, MessageItem("assistant", "1")])
    assert [item.id for item in input_items(stored, [])] == ["msg_1_in0"]
    kinds = [type(item).__name__ for item in conversation_items([stored], [])]
    assert kinds == ["InputMessageItem", "OutputMcpCall", "OutputMessage"]
    document = stored_document(stored)
    assert (document["created_at"], document["tools"]) == (1, [])
