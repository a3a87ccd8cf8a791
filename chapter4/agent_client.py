"""The frontend's questions to the agent."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields

from common.dispatch import dispatch
from common.openai import client_error
from common.openai_errors import FieldNames
from common.protocol import PipelineError, from_wire, hop_error, to_wire
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    NewConversation,
    RunEnded,
    StepStarted,
    StoredConversation,
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
    create_conversation: Client
    get_conversation: Client
    get_turns: Client
    delete_conversation: Client

    @classmethod
    async def of(cls, runtime: DistributedRuntime, namespace: str) -> "Agent":
        async def client(name: str) -> Client:
            return await runtime.endpoint(f"{namespace}.{name}").client()

        return cls(
            run=await client("agent.run"),
            planner=await client("planner.run"),
            get_response=await client("agent.get_response"),
            delete_response=await client("agent.delete_response"),
            create_conversation=await client("agent.create_conversation"),
            get_conversation=await client("agent.get_conversation"),
            get_turns=await client("agent.get_turns"),
            delete_conversation=await client("agent.delete_conversation"),
        )

    async def wait_for_instances(self) -> None:
        """Wait until an agent is listed for everything; each endpoint has a watch of its own."""
        for field in fields(self):
            if field.name != "planner":
                await getattr(self, field.name).wait_for_instances()

    async def check_answers(self) -> None:
        """Raise a `PipelineError` unless an agent answers: it is listed a moment before it can."""
        for endpoint in (self.get_response, self.get_conversation, self.get_turns):
            try:
                await _answers(endpoint, StoredQuery(""))
            except PipelineError as error:
                if error.info.kind != "not_found":
                    raise


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
    output = (await _answers(get_response, query))[-1]
    if output.response is None:
        raise PipelineError("internal", "The agent gave no answer.")
    return output.response


async def stored_conversation(
    endpoint: Client, query: StoredQuery | NewConversation
) -> StoredConversation:
    """The conversation, found or created; raises as `stored_response` does."""
    return _conversation(await _answers(endpoint, query))


async def stored_turns(get_turns: Client, query: StoredQuery) -> list[StoredResponse]:
    """The turns of the conversation, oldest first; raises as `stored_response` does."""
    answers = await _answers(get_turns, query)
    _conversation(answers)  # else the stream ended too early
    return [answer.response for answer in answers if answer.response is not None]


async def delete_stored(delete: Client, query: StoredQuery) -> None:
    """Delete what is stored under that id; raises a `PipelineError` as `stored_response` does."""
    await _answers(delete, query)


def _conversation(answers: list[StoredOutput]) -> StoredConversation:
    if answers[-1].conversation is None:
        raise PipelineError("unavailable", "The agent ended its answer too early.")
    return answers[-1].conversation


async def _answers(endpoint: Client, query: StoredQuery | NewConversation) -> list[StoredOutput]:
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
    for output in outputs:
        if output.error is not None:
            raise PipelineError.of(output.error)
    return outputs
