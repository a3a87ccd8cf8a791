"""The frontend's questions to the processor."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from chapter4.drafted_answer import drafted, needs_draft
from common.dispatch import dispatch
from common.openai import (
    CompletionRequest,
    ToolChatRequest,
    client_error,
    to_process_request,
    to_tool_process_request,
)
from common.openai_errors import FieldNames
from common.protocol import (
    EngineInfo,
    InfoOutput,
    PipelineError,
    ProcessRequest,
    TextOutput,
    from_wire,
    hop_error,
    to_wire,
)
from common.protocol_routing import RoutingHints
from common.waiting import linked_child

from dynamo.runtime import Client, Context
from prometheus_client import CollectorRegistry, Counter


def migration_counter(registry: CollectorRegistry) -> Counter:
    """The counter of Dynamo's frontend, `dynamo_frontend_model_migration_total`.

    Dynamo counts requests of which no token had come (`new_request`) as well.
    """
    return Counter(
        "dynamo_frontend_model_migration",
        "Answers that went on with another engine in the midst",
        ["migration_type"],
        registry=registry,
    ).labels("ongoing_request")


def ask_processor(
    processor: Client,
    request: ToolChatRequest | CompletionRequest,
    hints: RoutingHints,
    context: Context,
    migrations: Counter,
) -> AsyncGenerator[TextOutput, None]:
    """The processor's items; the last one has the finish reason, or this raises.

    Raises:
        PipelineError: the request failed, at any point of the stream.
    """

    def ask(
        question: ProcessRequest, context: Context = context
    ) -> AsyncGenerator[TextOutput, None]:
        wire = {**to_wire(question), "hints": to_wire(hints)}
        return _answer(processor, wire, request, context, migrations)

    async def ask_again(question: ProcessRequest) -> AsyncGenerator[TextOutput, None]:
        async with (
            linked_child(context, f"{context.id()}-answer") as child,
            aclosing(ask(question, child)) as outputs,
        ):
            async for output in outputs:
                yield output

    if not isinstance(request, ToolChatRequest):
        return ask(to_process_request(request))
    question = to_tool_process_request(request)
    return drafted(question, ask, ask_again) if needs_draft(question) else ask(question)


async def _answer(
    processor: Client,
    wire: dict[str, Any],
    names: FieldNames,
    context: Context,
    migrations: Counter,
) -> AsyncGenerator[TextOutput, None]:
    """One question's items.

    A stream is always read to its end: the runtime takes one that was dropped for the sign of
    a broken instance and sends that instance nothing for five seconds.
    """
    last: TextOutput | None = None
    try:
        async for item in dispatch(
            lambda: processor.round_robin(wire, annotated=False, context=context), context
        ):
            output = from_wire(item, TextOutput)
            if output.migrations:
                migrations.inc(output.migrations)
            if output.error is None and output.finish_reason is None:
                yield output
            else:
                last = output
    except PipelineError:
        raise
    except Exception as error:
        raise PipelineError.of(hop_error(error, "processor")) from error
    if last is None:
        raise PipelineError("unavailable", "The processor ended the stream too early.")
    if last.error is not None:
        raise PipelineError.of(client_error(names, last.error))
    yield last


async def engine_info(processor_info: Client, *, wait: bool = False) -> EngineInfo:
    """What the engine at the end of the chain says about itself; `wait` for it to be there."""
    try:
        if wait:
            await processor_info.wait_for_instances()
        stream = await processor_info.round_robin({"wait": wait}, annotated=False)
        replies = [from_wire(item, InfoOutput) async for item in stream]
    except Exception as error:
        raise PipelineError.of(hop_error(error, "processor")) from error
    if replies and replies[0].error is not None:
        raise PipelineError.of(replies[0].error)
    if not replies or replies[0].engine is None:
        raise PipelineError("unavailable", "The processor gave no answer.")
    return replies[0].engine
