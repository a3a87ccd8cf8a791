"""Canary requests: the router asks an engine for two tokens to see whether it is well.

So a client need not be the one that finds out. They go to engines that are quarantined or on
probation, now and then to those that have had no request for a while, and never wait behind
one another. What becomes of them is told to `health` like what becomes of any request.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator

from chapter4.agent_hints import pool_of
from chapter4.disaggregation import stands_alone
from chapter4.engine_record import Figures
from chapter4.outliers import SLOW_RATIO
from chapter4.selector import Selector
from chapter4.workers import Worker
from common.dispatch import NOT_LISTED
from common.protocol import EngineOutput, GenerateRequest, SamplingParams, from_wire, to_wire
from common.telemetry import log
from common.waiting import complete_with_failure

from dynamo.runtime import Client, Context

CHECK_INTERVAL_S = 0.25
# Fewer tokens than any block has, so that they leave nothing in a cache.
PROMPT = [100, 101, 102, 103]
# One answered so late was stuck with an engine that is well now, or that is for others to say.
LATE_S = 3.0

_request = to_wire(
    GenerateRequest(PROMPT, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
)


class Canaries:
    """Checks the selector's health records, and sends what canaries they ask for."""

    def __init__(self, selector: Selector, engines: Client) -> None:
        self._selector = selector
        self._engines = engines
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._numbers = itertools.count()

    async def keep_checking(self) -> None:
        """Never returns."""
        health = self._selector.health
        while True:
            now = time.monotonic()
            health.check(figures(self._selector.workers, now), now)
            self._selector.changed()
            for instance in self._tasks.keys() - self._selector.workers.keys():
                await self._stop(instance)
            if health.canaries:
                for instance in health.canaries_due(now):
                    if instance not in self._tasks or self._tasks[instance].done():
                        self._tasks[instance] = asyncio.create_task(self._ask(instance))
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def close(self) -> None:
        for instance in list(self._tasks):
            await self._stop(instance)

    async def _stop(self, instance: int) -> None:
        task = self._tasks.pop(instance)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _ask(self, instance: int) -> None:
        """Send one, and read its answer to the end: a dropped stream looks like a broken engine."""
        health = self._selector.health
        name = f"canary {next(self._numbers)}"
        tokens, began = 0, time.monotonic()
        load = self._selector.active.load(instance)
        ahead = load.prefill_tokens + len(PROMPT)
        health.sent(instance, name, began, tokens=ahead, own_tokens=len(PROMPT), canary=True)
        first = began
        try:
            stream = await self._engines.direct(
                _request, instance, annotated=False, context=Context()
            )
            async for item in stream:
                output = from_wire(item, EngineOutput)
                now = time.monotonic()
                if output.error is not None and output.error.kind in ("internal", "unavailable"):
                    health.failed(instance, name, now)
                if output.token_ids and not tokens and now - began <= LATE_S:
                    first = now
                    health.first_token(instance, name, now - began, now)
                tokens += len(output.token_ids)
        except Exception as error:  # the runtime raises nothing more precise
            if NOT_LISTED not in str(error):
                log.info("canary to engine instance %x: %s", instance, error)
                health.failed(instance, name, time.monotonic())
        else:
            now = time.monotonic()
            health.finished(instance, name, (now - first) / max(tokens - 1, 1), tokens, now)
        finally:
            health.ended(instance, name)


def figures(workers: dict[int, Worker], now: float) -> dict[int, Figures]:
    """What the engines' own metrics say, for `health`."""
    known = {}
    generating = [w.source for w in workers.values() if w.synced and w.source.role != "prefill"]
    # Models whose every answer can be had without an engine for prefill.
    alone = {source.info.model for source in generating} - {
        source.info.model for source in generating if not stands_alone(source)
    }
    for instance, worker in workers.items():
        info, metrics = worker.source.info, worker.metrics
        known[instance] = Figures(
            info.worker_id,
            f"{info.model} {info.backend} {worker.source.role} {pool_of(worker.tags)}",
            spare=worker.source.role == "prefill" and info.model in alone,
            canaries=stands_alone(worker.source),
            silent=worker.synced and worker.is_silent(now),
            serves=worker.synced,
            busy=metrics is None or metrics.running + metrics.waiting > 0,
            waiting=metrics.waiting if metrics else 0,
            done=metrics.prompt_tokens + metrics.output_tokens if metrics else 0,
        )
    return known


def add_health_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say when an engine is taken for sick."""
    env = os.environ.get
    parser.add_argument(
        "--slow-ratio",
        type=ratio,
        metavar="N",
        default=env("ROUTER_SLOW_RATIO", f"{SLOW_RATIO:g}"),
        help="quarantine an engine that takes so many times as long as the others do; raise it "
        "for engines that differ (env ROUTER_SLOW_RATIO, %(default)s)",
    )
    parser.add_argument(
        "--no-canaries",
        action="store_true",
        default=env("ROUTER_NO_CANARIES", "") not in ("", "0"),
        help="do not send engines requests of the router's own to see whether they are well "
        "(env ROUTER_NO_CANARIES=1)",
    )


def ratio(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 1")
    return number


@contextlib.asynccontextmanager
async def watching_health(
    engines: Client, selector: Selector, failed: asyncio.Future[BaseException]
) -> AsyncIterator[None]:
    """Keep the engines' health records for the length of the block, or until that has `failed`."""
    canaries = Canaries(selector, engines)
    task = asyncio.create_task(canaries.keep_checking())
    task.add_done_callback(lambda task: complete_with_failure(failed, task))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await canaries.close()
