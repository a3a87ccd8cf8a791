"""The agent's endpoints for what is stored of runs and conversations."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from chapter4.notes import Notes
from chapter4.sessions import Sessions
from common.handlers import Handler
from common.protocol import PipelineError, from_wire, to_wire
from common.protocol_agent import NewConversation, StoredOutput, StoredQuery

from dynamo.runtime import Context

Q = TypeVar("Q")


def stored_handlers(sessions: Sessions, notes: Notes) -> dict[str, Handler]:
    """The handlers, by the endpoint's name."""

    async def get_response(query: StoredQuery) -> list[StoredOutput]:
        return [StoredOutput(await sessions.get(query.id, query.user))]

    async def delete_response(query: StoredQuery) -> list[StoredOutput]:
        await sessions.delete(query.id, query.user)
        return [StoredOutput()]

    async def create_conversation(new: NewConversation) -> list[StoredOutput]:
        conversation = await sessions.create(new.user, new.metadata)
        return [StoredOutput(conversation=await sessions.conversation(conversation))]

    async def get_conversation(query: StoredQuery) -> list[StoredOutput]:
        return [StoredOutput(conversation=await sessions.conversation(query.id, query.user))]

    async def get_turns(query: StoredQuery) -> list[StoredOutput]:
        turns = await sessions.turns(query.id, query.user)
        return [*map(StoredOutput, turns), *await get_conversation(query)]

    async def delete_conversation(query: StoredQuery) -> list[StoredOutput]:
        await sessions.delete_conversation(query.id, query.user)
        await notes.forget_session(query.id)
        return [StoredOutput()]

    return {
        "get_response": _handler(StoredQuery, get_response),
        "delete_response": _handler(StoredQuery, delete_response),
        "create_conversation": _handler(NewConversation, create_conversation),
        "get_conversation": _handler(StoredQuery, get_conversation),
        "get_turns": _handler(StoredQuery, get_turns),
        "delete_conversation": _handler(StoredQuery, delete_conversation),
    }


def _handler(query_type: type[Q], act: Callable[[Q], Awaitable[list[StoredOutput]]]) -> Handler:
    async def answer(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        try:
            outputs = await act(from_wire(request, query_type))
        except PipelineError as error:
            outputs = [StoredOutput(error=error.info)]
        for output in outputs:
            yield to_wire(output)

    return answer
