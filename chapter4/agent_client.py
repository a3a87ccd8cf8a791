"""The frontend's questions to the agent."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from common.dispatch import dispatch
from common.openai import client_error
from common.openai_errors import FieldNames
from common.protocol import PipelineError, from_wire, hop_error, to_wire
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    RunEnded,
    StepStarted,
    StoredOutput,
    StoredQuery,
    StoredResponse,
)

import msgspec
from dynamo.runtime import Client, Context, DistributedRuntime


@dataclass(frozen=True)
class Agent:
    """Clients of the agent's endpoints, and of the planner's, which is asked in the same way."""

    run: Client
    planner: Client
    get_response: Client
    delete_response: Client
    delete_conversation: Client

    @classmethod
    async def of(cls, runtime: DistributedRuntime, namespace: str) -> "Agent":
        names = ("agent.run", "planner.run", "agent.get_response", "agent.delete_response")
        endpoints = [
            runtime.endpoint(f"{namespace}.{name}")
            for name in (*names, "agent.delete_conversation")
        ]
        return cls(*[await endpoint.client() for endpoint in endpoints])


async def ask_agent(
    agent: Client, request: AgentRequest, names: FieldNames, context: Context
) -> AsyncGenerator[AgentEvent, None]:
    """The events of a run; the last one is a `RunEnded`, or this raises.

    A run that fails before it has begun raises, so that it can be answered with a status. Until
    the first event another agent may take the run over. A stream is always read to its end: the
    runtime takes one that was dropped for the sign of a broken instance.

    Raises:
        PipelineError: the run could not begin, or broke off.
    """
    last: RunEnded | None = None
    begun = False
    held: list[AgentEvent] = []  # until it is known that the model takes the request
    wire = to_wire(request)
    try:
        async for item in dispatch(
            lambda: agent.round_robin(wire, annotated=False, context=context), context
        ):
            event: AgentEvent = msgspec.convert(item, AgentEvent)
            if isinstance(event, RunEnded):
                last = event
            elif isinstance(event, StepStarted) and not begun:
                held.append(event)
            else:
                begun = True
                for earlier in held:
                    yield earlier
                held.clear()
                yield event
    except Exception as error:
        raise PipelineError.of(hop_error(error, "agent")) from error
    if last is None:
        raise PipelineError("unavailable", "The agent ended the stream too early.")
    if last.error is not None:
        last.error = client_error(names, last.error)
        if not begun:
            raise PipelineError.of(last.error)
    for earlier in held:
        yield earlier
    yield last


async def stored_response(get_response: Client, query: StoredQuery) -> StoredResponse:
    """The response of that id; raises a `PipelineError`, kind `not_found`, if there is none."""
    output = await _answer(get_response, query)
    if output.response is None:
        raise PipelineError("internal", "The agent gave no answer.")
    return output.response


async def delete_stored(delete: Client, query: StoredQuery) -> None:
    """Delete what is stored under that id; raises a `PipelineError` as `stored_response` does."""
    await _answer(delete, query)


async def _answer(endpoint: Client, query: StoredQuery) -> StoredOutput:
    wire = to_wire(query)
    context = Context()
    try:
        items = dispatch(
            lambda: endpoint.round_robin(wire, annotated=False, context=context), context
        )
        outputs = [from_wire(item, StoredOutput) async for item in items]
    except Exception as error:
        raise PipelineError.of(hop_error(error, "agent")) from error
    if not outputs:
        raise PipelineError("unavailable", "The agent gave no answer.")
    if outputs[0].error is not None:
        raise PipelineError.of(outputs[0].error)
    return outputs[0]
