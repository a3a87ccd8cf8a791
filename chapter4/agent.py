"""The agent component: a task in; tools called, what they say considered, an answer out.

Stands between frontend and processor. Each step of a run is a request to the processor, with what
the agent is about to do as hints for the router. What was said is kept in NATS JetStream, so that
any agent can go on with any session.
Endpoints: `agent.run`, and those of `agent_store` for what is stored.
"""

import argparse
import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from chapter4.agent_loop import Run
from chapter4.agent_model import Model
from chapter4.agent_store import stored_handlers
from chapter4.agent_tools import own_tools
from chapter4.notes import note_tools, open_notes
from chapter4.session_settings import add_session_arguments, session_settings
from chapter4.sessions import open_sessions
from chapter4.tool_times import ToolTimes
from chapter4.toolbox import add_tool_arguments, open_toolbox
from common.handlers import Handler
from common.protocol import PipelineError, Usage, from_wire, to_wire
from common.protocol_agent import AgentRequest, RunEnded
from common.telemetry import request_log
from common.waiting import linked_child
from common.worker import Lifecycle, add_common_arguments, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    processor = await runtime.endpoint(f"{args.namespace}.processor.process").client()
    processor_info = await runtime.endpoint(f"{args.namespace}.processor.info").client()
    model = Model(processor, processor_info)
    times = ToolTimes()

    async def run_agent(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        log = request_log(context.id())
        usage = Usage(0, 0)
        try:
            wanted = from_wire(request, AgentRequest)
            tools = own_tools(wanted, toolbox)
            async with (
                await sessions.begin(wanted) as session,
                stopped_with(context, session.lost) as own,
            ):
                past = session.history
                this_run = Run(wanted, past, tools, model, times, own, session.id, usage=usage)
                async with aclosing(this_run.events()) as events:
                    async for event in events:
                        if isinstance(event, RunEnded):
                            log.info("%s: %s after %s", session.id, event.status, usage)
                            if not context.is_stopped():  # else it has never been
                                await session.commit(this_run.items, event)
                        yield to_wire(event)
        except PipelineError as error:
            log.warning("failed: %s", error)
            yield to_wire(RunEnded("failed", usage, error=error.info))

    settings = session_settings(args)
    async with (
        open_notes(args.namespace, settings) as notes,
        open_toolbox(args, note_tools(notes)) as toolbox,
        open_sessions(args.namespace, settings) as sessions,
    ):
        handlers: dict[str, Handler] = {"run": run_agent, **stored_handlers(sessions, notes)}
        await life.serve(
            runtime,
            {f"{args.namespace}.agent.{name}": handler for name, handler in handlers.items()},
        )


@asynccontextmanager
async def stopped_with(parent: Context, lost: asyncio.Event) -> AsyncIterator[Context]:
    """A context that is stopped with its parent, and when the session is lost to another run."""
    async with linked_child(parent, parent.id() or uuid.uuid4().hex) as own:

        async def stop() -> None:
            await lost.wait()
            own.stop_generating()

        stopping = asyncio.ensure_future(stop())
        try:
            yield own
        finally:
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    add_tool_arguments(parser)
    add_session_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run(worker, parse_args(), "agent")
