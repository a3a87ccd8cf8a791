"""The processor component: chat messages in, a stream of text out.

Applies the chat template, turns text into token ids, asks the router which engine is to have
them, turns that engine's token ids back into text, and ends the answer at a stop string. If the
engine dies in the midst of an answer, another one goes on with it.
Endpoints: `processor.process`, and `processor.info`, which passes on what the engine says about
itself.
"""

import argparse
import asyncio
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from chapter4.hops import Hops
from chapter4.migration import DEFAULT_MIGRATION_LIMIT, Progress
from chapter4.remote_prefill import DEFAULT_PREFILL_TIMEOUT_S, RemotePrefill
from chapter4.reports import reporting
from chapter4.routed_stream import routed_stream
from chapter4.router_client import ask_router
from common.arguments import non_negative_int, positive_seconds
from common.dispatch import dispatch
from common.model_files import DEFAULT_MODEL
from common.prompt import check_fits, tokenize
from common.protocol import (
    EngineInfo,
    InfoOutput,
    PipelineError,
    TextOutput,
    from_wire,
    hop_error,
    to_wire,
)
from common.protocol_agent import ToolProcessRequest
from common.protocol_router import WorkerState
from common.telemetry import log, request_log
from common.text import load_text_model
from common.text_stream import TextStream
from common.tool_calling import ToolCalling, has_tools
from common.waiting import first_of, link
from common.worker import ComponentError, Lifecycle, add_common_arguments, run

from dynamo.runtime import Client, Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    try:
        model = load_text_model(args.model, args.chat_template)
    except (OSError, ValueError) as error:
        raise ComponentError(str(error)) from error
    engine = await runtime.endpoint(f"{args.namespace}.engine.generate").client()
    engine_info = await runtime.endpoint(f"{args.namespace}.engine.info").client()
    router = await runtime.endpoint(f"{args.namespace}.router.find_worker").client()
    router_report = await runtime.endpoint(f"{args.namespace}.router.report").client()
    router_state = await runtime.endpoint(f"{args.namespace}.router.state").client()
    required = [] if args.router_fallback else [router, router_state]
    known: EngineInfo | None = None

    async def process(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        log = request_log(context.id())
        try:
            async for output in answer(from_wire(request, ToolProcessRequest), context):
                if output.usage is not None:
                    log.debug("%s after %s", output.finish_reason, output.usage)
                yield to_wire(output)
        except PipelineError as error:
            log.warning("failed: %s", error)
            yield to_wire(TextOutput(error=error.info))

    async def answer(
        request: ToolProcessRequest, context: Context
    ) -> AsyncGenerator[TextOutput, None]:
        """The life of one request: text to token ids, engine, token ids to text."""
        started = time.perf_counter()
        engine_is = known or await checked_engine(context)
        calling = ToolCalling(model, request) if has_tools(request) else None
        sampling, stop = request.sampling, request.stop
        prompt = await tokenize(model, request, calling.token_ids if calling else None)
        check_fits(prompt, engine_is.context_length)
        room = engine_is.context_length - len(prompt)
        if request.cut_to_room and sampling.max_tokens is not None:
            sampling.max_tokens = min(sampling.max_tokens, room)
        if calling is not None:
            sampling = await asyncio.to_thread(calling.sampling, room)
            stop = calling.stop
        text = TextStream(
            model,
            stop,
            min_tokens=sampling.min_tokens,
            prompt_tokens=len(prompt),
            started=started,
            visible=() if calling is None else calling.visible,
        )
        progress = Progress(prompt, sampling, engine_is.context_length, args.migration_limit)
        # Passing our context on is what carries a cancellation to the engine. To end the engine's
        # work at a stop string or a call, and not our own answer with it, takes one of its own.
        may_end = bool(stop) or calling is not None
        engine_context = context.detached(context.id()) if may_end else context
        linked = asyncio.ensure_future(link(context, engine_context)) if may_end else None
        finished = False
        try:
            async for item in routed_stream(hops, request, progress, started, engine_context):
                if finished:
                    continue  # a stream that is not read to its end looks like a broken engine
                output = text.push(item)
                if calling is not None:
                    output = calling.push(output)
                    if calling.done and output.usage is None:
                        text.end(output)
                output.migrations = progress.take_migrations()
                finished = output.finish_reason is not None
                yield output
                if finished and may_end:
                    engine_context.stop_generating()
        except PipelineError as error:
            if not context.is_stopped():  # else it is why the router gave no answer
                if calling is not None and (refusal := calling.refusal(error)):
                    raise refusal from error
                raise
        except Exception as error:
            if finished:
                log.warning("after the answer's end: %s", error)
                return
            raise PipelineError.of(hop_error(error, "engine")) from error
        finally:
            if linked is not None:
                linked.cancel()
        if not finished and not context.is_stopped():
            raise PipelineError("unavailable", "The engine ended the stream too early.")

    async def info(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        try:
            if request.get("wait"):
                for client in (engine, engine_info, *required):  # each has a watch of its own
                    stopped = context.async_killed_or_stopped()
                    await first_of(client.wait_for_instances(), stopped, life.stop.wait())
            if required:
                # One that was killed is listed until its lease expires, but does not answer.
                await ask_router(router_state, {}, WorkerState, context)
            reply = InfoOutput(engine=await checked_engine(context))
        except PipelineError as error:
            reply = InfoOutput(error=error.info)
        yield to_wire(reply)

    async def checked_engine(context: Context) -> EngineInfo:
        """What an engine says about itself; it must be made for our token ids."""
        nonlocal known
        found = await ask_engine(engine_info, context)
        if found.model != model.name:
            message = f"the engine has the model {found.model}, the processor that of {model.name}"
            raise PipelineError("unavailable", f"{message}; start both with the same --model.")
        known = found
        return found

    async with reporting(router_report) as reporter:
        prefill = RemotePrefill(engine, args.prefill_timeout)
        hops = Hops(
            model.name, engine, router, router_state, reporter, prefill, args.router_fallback
        )
        try:
            await life.serve(
                runtime,
                {
                    f"{args.namespace}.processor.process": process,
                    f"{args.namespace}.processor.info": info,
                },
                draining=reporter.drain,
            )
        finally:
            await prefill.close()


async def ask_engine(client: Client, context: Context) -> EngineInfo:
    """What an engine says about itself."""
    try:
        items = dispatch(lambda: client.round_robin({}, annotated=False, context=context), context)
        infos = [from_wire(item, EngineInfo) async for item in items]
    except Exception as error:
        raise PipelineError.of(hop_error(error, "engine")) from error
    if not infos:
        raise PipelineError("unavailable", "The engine gave no answer.")
    return infos[0]


def parse_args() -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--model",
        default=env("MODEL", DEFAULT_MODEL),
        help="the same as the engine's: a .gguf file, a Hugging Face folder, or the model that "
        "comes with the project (env MODEL, %(default)s)",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a jinja2 chat template to use instead of the model's own",
    )
    parser.add_argument(
        "--router-fallback",
        action="store_true",
        default=env("ROUTER_FALLBACK", "") not in ("", "0"),
        help="with no router, let the engines take turns instead of failing (env "
        "ROUTER_FALLBACK=1)",
    )
    parser.add_argument(
        "--migration-limit",
        type=non_negative_int,
        metavar="TIMES",
        default=env("MIGRATION_LIMIT", str(DEFAULT_MIGRATION_LIMIT)),
        help="when an engine dies in the midst of an answer, another one goes on with it, so many "
        "times at most; 0 lets the answer break off (env MIGRATION_LIMIT, %(default)s)",
    )
    parser.add_argument(
        "--prefill-timeout",
        type=positive_seconds,
        metavar="SECONDS",
        default=env("PREFILL_TIMEOUT", f"{DEFAULT_PREFILL_TIMEOUT_S:g}"),
        help="a prompt that a prefill engine has not computed by then is computed by the engine "
        "that generates the answer (env PREFILL_TIMEOUT, %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(worker, parse_args(), "processor")
