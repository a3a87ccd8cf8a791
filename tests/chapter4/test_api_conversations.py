"""Stored responses and conversations with the official `openai` client."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import MODEL, http_client
from tests.chapter4.scripted import CALL, scripted_pipeline

import openai
import pytest
import pytest_asyncio
from openai.types.conversations import ConversationItem
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

SCRIPT = [
    (r"(?s)Add two.*<tool_output>.*Thanks", "You are welcome."),
    (r"(?s)Add two.*<tool_output>", "It is 4."),
    (r"Add two", CALL % ("calculator", '{"expression": "2+2"}')),
    (r"(?s)Which notes.*<tool_output>", "Those."),
    (r"Which notes", CALL % ("list_notes", "{}")),
    (r"(?s)Note it.*<tool_output>", "Noted."),
    (r"Note it", CALL % ("write_note", '{"text": "The code is 7."}')),
    (r"", "Hello, you."),
]
BUILTIN: Any = {"type": "mcp", "server_label": "builtin", "require_approval": "never"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(
    servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pipeline]:
    async with scripted_pipeline(servers, tmp_path_factory.mktemp("script"), SCRIPT) as running:
        yield running


@pytest_asyncio.fixture
async def api(running: Pipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        api_key="none", base_url=f"{running.url}/v1", max_retries=0
    ) as api:
        yield api


async def test_a_conversation_is_created_used_and_deleted(api: openai.AsyncOpenAI) -> None:
    made = await api.conversations.create(metadata={"topic": "sums"})
    assert made.metadata == {"topic": "sums"}
    assert await api.conversations.retrieve(made.id) == made
    none_yet = await api.conversations.items.list(made.id)
    assert (none_yet.data, none_yet.has_more) == ([], False)

    first = await api.responses.create(
        model=MODEL, input="Add two and two.", conversation=made.id, tools=[BUILTIN]
    )
    await api.responses.create(
        model=MODEL, input="Thanks!", conversation={"id": made.id}, tools=[BUILTIN]
    )
    assert await api.conversations.retrieve(made.id) == made, "runs keep what it was made with"
    items = [item async for item in api.conversations.items.list(made.id, order="asc", limit=2)]
    assert [item.type for item in items] == ["message", "mcp_call", "message", "message", "message"]
    assert [item.id for item in items[1:3]] == [item.id for item in first.output]
    texts = [item.content[0].text for item in items if item.type == "message"]  # type: ignore[union-attr]
    assert texts == ["Add two and two.", "It is 4.", "Thanks!", "You are welcome."]
    for item in items:
        check(ConversationItem, item)

    assert (await api.conversations.delete(made.id)).deleted
    for gone in (api.conversations.retrieve(made.id), api.conversations.delete(made.id)):
        with pytest.raises(openai.NotFoundError):
            await gone
    with pytest.raises(openai.NotFoundError):
        await api.conversations.items.list(made.id)


@pytest.mark.parametrize("user", ["", "carl"])
async def test_a_conversations_notes_go_with_it_but_a_users_stay(
    api: openai.AsyncOpenAI, user: str
) -> None:
    conversation = f"conv_{uuid.uuid4().hex}"
    whose: Any = {"user": user} if user else {}

    async def noted() -> bool:
        response = await api.responses.create(
            model=MODEL, input="Which notes?", conversation=conversation, tools=[BUILTIN], **whose
        )
        listed = response.output[0]
        assert listed.type == "mcp_call"
        return "The code is 7." in (listed.output or "")

    await api.responses.create(
        model=MODEL, input="Note it.", conversation=conversation, tools=[BUILTIN], **whose
    )
    assert await noted()
    await api.conversations.delete(conversation, extra_query=whose)
    assert await noted() == bool(user)


async def test_a_conversation_that_a_run_began_is_one_too(api: openai.AsyncOpenAI) -> None:
    response = await api.responses.create(model=MODEL, input="Hello")
    assert response.conversation is not None
    found = await api.conversations.retrieve(response.conversation.id)
    assert found.metadata == {}
    assert abs(found.created_at - response.created_at) <= 60


async def test_a_run_that_fails_leaves_the_conversation(api: openai.AsyncOpenAI) -> None:
    made = await api.conversations.create()
    output: Any = {"type": "function_call_output", "call_id": "call_x", "output": "18"}
    with pytest.raises(openai.BadRequestError):
        await api.responses.create(model=MODEL, input=[output], conversation=made.id)
    assert await api.conversations.retrieve(made.id) == made


async def test_a_conversation_of_a_user(api: openai.AsyncOpenAI) -> None:
    """To others it is not there, whatever they ask of it."""
    whose: Any = {"user": "ann"}
    made = await api.conversations.create(extra_query=whose)
    for refused in (
        api.conversations.retrieve(made.id),
        api.conversations.delete(made.id),
        api.responses.create(model=MODEL, input="Hello", conversation=made.id, user="bob"),
    ):
        with pytest.raises(openai.NotFoundError):
            await refused
    with pytest.raises(openai.NotFoundError):
        await api.conversations.items.list(made.id)
    await api.responses.create(model=MODEL, input="Hello", conversation=made.id, user="ann")
    assert len((await api.conversations.items.list(made.id, extra_query=whose)).data) == 2


async def test_what_a_response_was_asked(api: openai.AsyncOpenAI) -> None:
    asked: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What is the weather?"},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "18 degrees"},
        {"role": "assistant", "content": "It is 18 degrees."},
        {"role": "user", "content": "Hello"},
    ]
    response = await api.responses.create(model=MODEL, input=asked)
    items = [i async for i in api.responses.input_items.list(response.id, order="asc", limit=4)]
    for item in items:
        check(ResponseItem, item)
    kinds = ["message", "message", "function_call", "function_call_output", "message", "message"]
    assert [item.type for item in items] == kinds
    newest = await api.responses.input_items.list(response.id, limit=1)
    assert (newest.data, newest.has_more) == (items[-1:], True)
    before = await api.responses.input_items.list(response.id, after=newest.data[0].id)
    assert (before.data, before.has_more) == (items[-2::-1], False)
    history: Any = [*items, {"role": "user", "content": "Hello"}]
    again = await api.responses.create(model=MODEL, input=history)
    assert again.output_text == "Hello, you.", "what was listed may be sent back"


async def test_lists_refuse_what_they_do_not_know(api: openai.AsyncOpenAI) -> None:
    response = await api.responses.create(model=MODEL, input="Hello")
    listed = api.responses.input_items.list
    wrong: Any = {"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_x"}
    for query in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            await listed(response.id, **query)
        assert caught.value.param == next(iter(query))
    with pytest.raises(openai.BadRequestError) as caught:
        await listed(response.id, extra_query={"page": 2})
    assert caught.value.param == "page"
    with pytest.raises(openai.NotFoundError):
        await listed("resp_x")
    item: Any = {"role": "user", "content": "Hello"}
    with pytest.raises(openai.BadRequestError) as caught:
        await api.conversations.create(items=[item])
    assert caught.value.param == "items"


async def test_a_search_is_listed_with_what_is_included(api: openai.AsyncOpenAI) -> None:
    call: Any = {"type": "file_search_call", "id": "fs_1", "queries": ["x"], "status": "completed"}
    found = {**call, "results": [{"text": "what was found"}]}
    tool: Any = {"type": "file_search", "vector_store_ids": ["documents"]}
    asked: Any = [found, {"role": "user", "content": "Hello"}]
    response = await api.responses.create(model=MODEL, input=asked, tools=[tool])
    bare = (await api.responses.input_items.list(response.id, order="asc")).data[0]
    assert bare.type == "file_search_call"
    assert bare.results is None
    page = await api.responses.input_items.list(
        response.id, include=["file_search_call.results"], order="asc"
    )
    whole = page.data[0]
    assert whole.type == "file_search_call"
    assert whole.results is not None
    assert [result.text for result in whole.results] == ["what was found"]


async def test_the_openapi_document_has_the_lists(running: Pipeline) -> None:
    async with http_client(running.url) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths["/v1/conversations"]) == {"post"}
    assert set(paths["/v1/conversations/{conversation}"]) == {"get", "delete"}
    for path in (
        "/v1/responses/{response_id}/input_items",
        "/v1/conversations/{conversation}/items",
    ):
        names = {parameter["name"] for parameter in paths[path]["get"]["parameters"]}
        assert names >= {"order", "limit", "after", "include[]", "user"}


def check(kind: Any, item: Any) -> None:
    """It has what the client's models say that it has, and nothing of a wrong type."""
    TypeAdapter[Any](kind).validate_json(item.model_dump_json(by_alias=True), strict=True)
