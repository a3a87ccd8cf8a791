"""The launcher: a chapter's pipeline on this machine, from one command.

    python -m launch chapter1 --ask "What is the capital of France?"

Starts NATS and etcd, the chapter's components as processes of their own, and waits until all
are ready. With --ask it asks, prints the answers on standard output and stops everything;
without, the pipeline serves until Ctrl-C. Progress and logs go to standard error.
"""

import argparse
import asyncio
import io
import os
import shlex
import signal
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from launch.arguments import HTTP_PORT, parse_arguments
from launch.asking import answer_questions
from launch.chapters import EXTERNAL_BACKENDS, PAGES, SURVIVE, Options, check_chapter
from launch.child import READY_TIMEOUT, Child, ChildFailedError
from launch.children import Children
from launch.errors import LaunchError
from launch.output import LogPrinter, say
from launch.pipeline import Pipeline, pipeline
from launch.ports import http_port, is_free
from launch.servers import (
    ETCD_PORT,
    NATS_PORT,
    check_etcd,
    check_nats,
    etcd_server,
    nats_server,
    server_environment,
)

EXTERNAL_READY_TIMEOUT = 1800.0  # seconds: the weights may have to be downloaded
CHILD_ENDS_S = 1.0


def main() -> int:
    """Run the launcher; the exit status."""
    arguments = parse_arguments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may have characters that an ASCII terminal lacks.
        sys.stdout.reconfigure(errors="replace")
    try:
        return asyncio.run(launch(arguments))
    except LaunchError as error:
        say(f"error: {error}")
        return 1
    except BrokenPipeError:
        # Nobody reads the answer any more; without this, the flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


async def launch(arguments: argparse.Namespace) -> int:
    """Start everything, answer or serve, stop everything; the exit status.

    0 when the questions were answered, or a signal ended the serving; 1 when something
    failed; 128 + signal number when a signal came before the work was done.
    """
    check_chapter(arguments)
    named = _named_servers()
    _check_model(arguments)
    options = Options(
        namespace=arguments.namespace,
        engines=arguments.engines,
        backend=arguments.backend,
        model=arguments.model,
        policy=arguments.policy,
        shadow=arguments.shadow,
        prefill=arguments.prefill,
        routers=arguments.routers,
        port=http_port(arguments.port, HTTP_PORT),
    )
    show_logs = arguments.verbose or not arguments.ask
    with Children(LogPrinter(verbose=arguments.verbose) if show_logs else None) as children:
        stop = StopSignals(children)
        try:
            async with AsyncExitStack() as stack:
                environment = await _servers(stack, children, named)
                if arguments.engine_flags is not None:
                    environment["ENGINE_FLAGS"] = shlex.join(arguments.engine_flags)
                running = await stack.enter_async_context(
                    pipeline(children, environment, arguments.chapter, options)
                )
                status = await _until_done(running, arguments, stop)
        except ChildFailedError:
            if not stop.killed:
                raise
        if stop.killed:
            return 128 + signal.SIGINT
        return status or _check_stopped(running)


class StopSignals:
    """Ctrl-C and SIGTERM: the first asks for an orderly stop, the second kills the children."""

    def __init__(self, children: Children) -> None:
        self.first: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.killed = False
        self._children = children
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if not self.first.done():
            self.first.set_result(number)
            say("stopping … (Ctrl-C again kills)")
        else:
            self.killed = True
            self._children.kill_all()


def _named_servers() -> dict[str, str]:
    """The servers that the environment names: complete addresses by variable."""
    # Looked up before `common` is imported, which names the default ones.
    names = [name for name in ("NATS_SERVER", "ETCD_ENDPOINTS") if os.environ.get(name)]
    from common.errors import ComponentError
    from common.server_addresses import server_addresses

    try:
        return {name: ",".join(server_addresses(name)) for name in names}
    except ComponentError as error:
        raise LaunchError(str(error)) from error


def _check_model(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        return
    from common.model_files import find_model, served_name

    try:
        if arguments.backend in ("simulated", *EXTERNAL_BACKENDS):
            served_name(arguments.model)  # a folder will do
        else:
            find_model(arguments.model)
    except (OSError, ValueError) as error:
        raise LaunchError(f"--model: {error}") from error


async def _servers(
    stack: AsyncExitStack, children: Children, named: dict[str, str]
) -> dict[str, str]:
    """Check the servers that were named, start the others."""
    nats_url, etcd_url = named.get("NATS_SERVER"), named.get("ETCD_ENDPOINTS")
    if nats_url:
        check_nats(nats_url)
    if etcd_url:
        check_etcd(etcd_url)
    if not nats_url:
        port = _server_port("NATS", NATS_PORT, "NATS_SERVER")
        nats_url = (await stack.enter_async_context(nats_server(children, port))).url
    if not etcd_url:
        port = _server_port("etcd", ETCD_PORT, "ETCD_ENDPOINTS")
        etcd_url = (await stack.enter_async_context(etcd_server(children, port))).url
    say(f"NATS at {nats_url}, etcd at {etcd_url}")
    return server_environment(nats_url, etcd_url)


def _server_port(server: str, default: int, variable: str) -> int | None:
    if is_free(default):
        return default
    say(
        f"port {default} is taken, so {server} gets a free one (if a {server} that you want to "
        f"use runs there, name it in {variable})"
    )
    return None


async def _until_done(running: Pipeline, arguments: argparse.Namespace, stop: StopSignals) -> int:
    """Answer or serve until that is done, a child fails or a signal comes."""
    work = asyncio.create_task(_work(running, arguments))
    failure = asyncio.create_task(running.children.first_failure())
    try:
        events: set[asyncio.Future[Any]] = {work, failure, stop.first}
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.exception() is not None:
            # A request that broke off may have broken because a child is just ending.
            await asyncio.wait({failure}, timeout=CHILD_ENDS_S)
        if failure.done():
            raise failure.result()
        if work.done():
            await work
            return 0
        return 0 if running.ready and not arguments.ask else 128 + stop.first.result()
    finally:
        work.cancel()
        failure.cancel()


async def _work(running: Pipeline, arguments: argparse.Namespace) -> None:
    """Wait until the pipeline is ready; ask the questions, or serve for ever."""
    began = time.perf_counter()
    say(f"starting {', '.join(running.processes)} …")
    slow = arguments.backend in EXTERNAL_BACKENDS
    await running.wait_ready(EXTERNAL_READY_TIMEOUT if slow else READY_TIMEOUT)
    note = " (simulated: the words mean nothing)" if arguments.backend == "simulated" else ""
    say(f"ready in {time.perf_counter() - began:.1f} s{note}")
    if arguments.chapter in SURVIVE:
        running.children.dispensable = lambda child: _goes_on_without(running, child)
    if not arguments.ask:
        print(f"Chat page:  {running.url}/")
        print(f"OpenAI API: {running.url}/v1")
        for name, path in PAGES.get(arguments.chapter, {}).items():
            print(f"{name}: {running.url}{path}")
        print("Ctrl-C stops everything.", flush=True)
        await asyncio.get_running_loop().create_future()  # until it is cancelled
    await answer_questions(running.url, arguments)


def _goes_on_without(running: Pipeline, child: Child) -> bool:
    """Whether another one does the work of a child that has ended; says so."""
    if not running.has_replica(child.name):
        return False
    say(f"{child.name} has ended with status {child.exited.result()}; the others go on")
    return True


def _check_stopped(running: Pipeline) -> int:
    """Tell about components that did not end well when they were stopped."""
    status = 0
    for child in running.processes.values():
        # One that was still starting had no handler for SIGTERM yet.
        if child.stopping and child.exited.result() not in (0, -signal.SIGTERM):
            say(f"warning: while stopping, {child.failure()}")
            status = 1
    return status
