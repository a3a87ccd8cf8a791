"""Those who choose an engine, ours and Dynamo's, to be timed on the same prompts."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.report import GuardError
from benchmarks.router_fleet import BLOCK_SIZE, MODEL, Fleet
from benchmarks.router_peers import PeerUnavailableError, kv_router, selection_service
from chapter2.selector import Selector
from common.protocol import from_wire, to_wire
from common.protocol_router import FindWorkerOutput, FindWorkerRequest

from dynamo.llm import compute_block_hash_for_seq


@dataclass(frozen=True)
class Contender:
    """`decide` is timed, on what `prepare` makes of a prompt.

    `read` gets from the outcome the engines in it, by id, and the best overlap in blocks.
    """

    who: str
    prepare: Callable[[list[int]], Any]
    decide: Callable[[Any], Awaitable[Any]]
    read: Callable[[Any], tuple[set[int], int]]


def ours(selector: Selector) -> list[Contender]:
    async def select(prompt: list[int]) -> FindWorkerOutput:
        return selector.select(prompt, MODEL)

    async def find_worker(request: dict[str, Any]) -> dict[str, Any]:
        wanted = from_wire(request, FindWorkerRequest)
        return to_wire(selector.select(wanted.token_ids, wanted.model, wanted.failed))

    async def find_matches(hashes: list[int]) -> Any:
        return selector.index._tree.find_matches(hashes).scores

    return [
        Contender("select", list, select, lambda o: ({o.instance_id}, o.overlap_blocks)),
        Contender(
            "find_worker",
            lambda prompt: {"token_ids": prompt, "model": MODEL},
            find_worker,
            lambda output: ({output["instance_id"]}, output.get("overlap_blocks", 0)),
        ),
        Contender(
            "RadixTree.find_matches",
            lambda prompt: compute_block_hash_for_seq(prompt, BLOCK_SIZE),
            find_matches,
            lambda scores: (
                {instance for instance, _ in scores},
                max(scores.values(), default=0),
            ),
        ),
    ]


async def peers(fleet: Fleet, stack: AsyncExitStack, left_out: dict[str, str]) -> list[Contender]:
    contenders: list[Contender] = []
    try:
        router = await stack.enter_async_context(kv_router(fleet))
        contenders.append(
            Contender(
                "KvRouter.best_worker",
                list,
                router.best_worker,
                lambda chosen: ({chosen[1] + 1}, chosen[2]),
            )
        )
    except PeerUnavailableError as error:
        left_out["KvRouter.best_worker"] = str(error)
    try:
        service = await stack.enter_async_context(selection_service(fleet))
        contenders.append(
            Contender(
                "SelectionService.select",
                lambda prompt: {"model_name": MODEL, "token_ids": prompt},
                service.select,
                lambda chosen: (
                    {chosen["worker_id"]},
                    chosen["overlap"]["longest_matched"] // BLOCK_SIZE,
                ),
            )
        )
    except PeerUnavailableError as error:
        left_out["SelectionService.select"] = str(error)
    return contenders


def check(who: str, fleet: Fleet, outcomes: list[tuple[set[int], int]]) -> None:
    strangers = set[int]().union(*[engines for engines, _ in outcomes]) - set(fleet.instances)
    if strangers:
        raise GuardError(f"{who} chose {strangers}, which are no engines of {len(fleet.instances)}")
    if not any(overlap for _, overlap in outcomes):
        raise GuardError(f"{who} never found a block that is cached: no event was applied")
