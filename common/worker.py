"""The life of a component: settings, runtime, readiness, signals, drain, exit status.

A chapter script is a `@dynamo_worker()` function and a call of `run`:

    @dynamo_worker()
    async def worker(runtime, args, life):
        ...
        await life.serve(runtime, {"namespace.component.endpoint": handler})

    if __name__ == "__main__":
        run(worker, parse_args(), "engine-0")

The first SIGTERM or SIGINT drains (deregister, finish what is in flight, exit 0), a second one
exits at once.
"""

import argparse
import asyncio
import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from common.arguments import positive_seconds
from common.errors import ComponentError
from common.handlers import Handler, closed_on_its_loop, let_go_of_dropped_streams
from common.notify import notify
from common.server_addresses import wait_for_servers
from common.telemetry import log, setup_logging

import uvloop
from dynamo.runtime import DistributedRuntime, Endpoint

__all__ = ["ComponentError", "Lifecycle", "add_common_arguments", "run"]

# Callers learn from an etcd watch that an instance is gone; requests that they sent just before
# still arrive and must find their handler.
DEREGISTER_GRACE_S = 0.5
LISTED_CHECK_S = 0.01
LOG_LEVELS = ("debug", "info", "warning", "error")


class Lifecycle:
    """What `run` hands to the component: when to stop, and how to serve until then."""

    def __init__(self, drain_timeout_s: float) -> None:
        self.drain_timeout_s = drain_timeout_s
        self.stop = asyncio.Event()
        self.serving = False

    async def serve(
        self,
        runtime: DistributedRuntime,
        handlers: dict[str, Handler],
        *,
        ready: Callable[[], Awaitable[None]] | None = None,
        failed: asyncio.Future[BaseException] | None = None,
        draining: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Serve endpoints, by path, until a signal; then deregister and finish what is in flight.

        `ready` may delay the READY notification until the component is of use. `failed` is a
        fault of the component's own that ends it; `draining` runs after deregistration and
        ends when the component's other work (an HTTP server, say) is done.

        Raises:
            ComponentError: the lease was lost, so that nobody can find this process any
                more, or `failed` completed.
        """
        endpoints = [runtime.endpoint(path) for path in handlers]
        served: list[asyncio.Future[None]] = [
            asyncio.ensure_future(endpoint.serve_endpoint(closed_on_its_loop(handler)))
            for endpoint, handler in zip(endpoints, handlers.values(), strict=True)
        ]
        await asyncio.gather(*map(_listed, endpoints, served))
        self.serving = True
        stopped = asyncio.ensure_future(self.stop.wait())
        announced = asyncio.ensure_future(_announce(ready))
        letting_go = asyncio.ensure_future(let_go_of_dropped_streams(endpoints[0]))
        causes: list[asyncio.Future[Any]] = [*served, stopped, announced]
        if failed is not None:
            causes.append(failed)
        try:
            done, _ = await asyncio.wait(causes, return_when=asyncio.FIRST_COMPLETED)
            if announced in done:
                announced.result()
            fault = None
            if failed is not None and failed.done():
                fault = f"failed: {failed.result()}"
            elif not stopped.done():
                # The runtime does not raise when it loses its lease: it ends `served`, and goes
                # on with an empty view of the world.
                fault = "lost its etcd lease, nobody can find it"
            if fault is None:
                log.info("draining: finishing what is in flight")
            else:
                log.error("%s: finishing what is in flight", fault)
            await self._drain(runtime, endpoints, served, draining)
            if fault is not None:
                raise ComponentError(fault)
        finally:
            tasks = (stopped, announced, letting_go)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(
        self,
        runtime: DistributedRuntime,
        endpoints: list[Endpoint],
        served: list[asyncio.Future[None]],
        draining: Callable[[], Awaitable[None]] | None,
    ) -> None:
        notify("STOPPING=1")
        try:
            async with asyncio.timeout(self.drain_timeout_s):
                await _deregister(endpoints)
                if draining is not None:
                    await draining()
                await asyncio.sleep(min(DEREGISTER_GRACE_S, self.drain_timeout_s / 2))
                runtime.shutdown()  # lets handlers in flight finish, then ends `served`
                await asyncio.gather(*served)
        except TimeoutError:
            log.warning("drain took longer than %g s; giving up", self.drain_timeout_s)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every component has."""
    env = os.environ.get
    parser.add_argument(
        "--namespace",
        type=_namespace,
        default=env("DYN_NAMESPACE", "inference"),
        help="components of one pipeline find each other in it (env DYN_NAMESPACE, %(default)s)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=positive_seconds,
        metavar="SECONDS",
        default=env("DRAIN_TIMEOUT", "30"),
        help="on SIGTERM, give requests in flight this long (env DRAIN_TIMEOUT, %(default)s)",
    )
    parser.add_argument(
        "--log-level",
        type=_log_level,
        metavar="|".join(LOG_LEVELS),
        default=env("LOG_LEVEL", "info"),
        help="(env LOG_LEVEL, %(default)s)",
    )
    parser.add_argument(
        "--log-json",
        action="store_true",
        default=env("LOG_JSON", "") not in ("", "0"),
        help="log one JSON object a line (env LOG_JSON=1; it reaches the runtime's own lines, too)",
    )


def _namespace(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of letters, digits, '_' and '-'")
    return text


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def run(
    worker: Callable[..., Awaitable[None]], args: argparse.Namespace, component: str
) -> NoReturn:
    """Run `worker(runtime, args, lifecycle)` (a `@dynamo_worker()` function) and exit."""
    setup_logging(component, args.log_level, json=args.log_json)
    try:
        uvloop.run(_supervise(worker, args))
    except ComponentError as error:
        log.error("%s", error)
        status = 1
    except Exception:
        log.exception("stopped by an unexpected error")
        status = 1
    else:
        status = 0
    logging.shutdown()
    sys.stdout.flush()
    # The runtime's own threads may still hold connections; nothing of ours is left to close.
    os._exit(status)


async def _supervise(worker: Callable[..., Awaitable[None]], args: argparse.Namespace) -> None:
    life = Lifecycle(args.drain_timeout)
    loop = asyncio.get_running_loop()

    async def start() -> None:
        await wait_for_servers()
        await worker(args, life)

    working = asyncio.ensure_future(start())

    def on_signal(number: int) -> None:
        if life.stop.is_set():
            log.warning("second signal: exiting at once")
            os._exit(128 + number)
        life.stop.set()
        if not life.serving:
            working.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await working
    except asyncio.CancelledError:
        if not life.stop.is_set():
            raise
        log.info("stopped before it was ready")


async def _listed(endpoint: Endpoint, served: asyncio.Future[None]) -> None:
    """Return when discovery lists this process's instance of the endpoint."""
    client = await endpoint.client()
    while endpoint.connection_id() not in client.instance_ids():
        if served.done():  # and so will never be listed
            raise ComponentError(f"not listed: {served.exception() or 'the etcd lease is lost'}")
        await asyncio.sleep(LISTED_CHECK_S)


async def _deregister(endpoints: list[Endpoint]) -> None:
    for endpoint in endpoints:
        try:
            await endpoint.unregister_endpoint_instance()
        except Exception as error:  # the runtime raises nothing more precise
            log.warning("still listed until its lease expires: %s", error)


async def _announce(ready: Callable[[], Awaitable[None]] | None) -> NoReturn:
    """Tell the supervisor when the component is of use; return only by an exception."""
    if ready is not None:
        await ready()
    gc.collect()
    gc.freeze()  # what start-up made stays; scanning it again and again would cost every request
    log.info("ready")
    notify("READY=1")
    while True:
        await asyncio.Event().wait()
