"""Two routers of a running pipeline: one mind, and either may go."""

import asyncio
import os
import signal

from tests.chapter1.helpers import (
    engine_settings,
    eventually,
    http_client,
    load,
    start_with_lease,
)
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import Router, ask, prompt
from tests.conftest import StartPipeline


async def wait_for_both(router: Router, engines: int) -> list[int]:
    """The instances of two routers that know their engines and each other."""

    async def know_all() -> bool:
        instances = await router.routers()
        if len(instances) != 2:
            return False
        for instance in instances:
            states = await router.workers(instance)
            if [state.state for state in states] != ["ready"] * engines:
                return False
        return True

    await eventually(know_all)

    def know_each_other() -> bool:
        processes = router.running.processes
        logs = [processes[name].log for name in ("router0", "router1")]
        return all(any("messages of its snapshot" in line for line in list(log)) for log in logs)

    await eventually(know_each_other)
    return await router.routers()


async def test_two_routers_are_of_one_mind_and_either_may_go(
    start_pipeline: StartPipeline, router_of: RouterOf, servers: dict[str, str]
) -> None:
    others = ["router0", "processor", "frontend", *(f"engine{n}" for n in range(4))]
    async with (
        start_pipeline(
            chapter="chapter3",
            engines=4,
            routers=2,
            start=others,
            arguments={"engine": engine_settings(decode_base_ms=20)},
            environment={**servers, "ETCD_LEASE_TTL": "60"},  # who is stopped is not to lose it
        ) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await start_with_lease(running, "router1", 6).wait_ready()
        first, second = await wait_for_both(router, 4)

        # A prompt that one router has just sent somewhere, the other one sends there, too.
        for number in range(8):
            tokens = [1000 + number] * 160
            chosen = await router.route(tokens, request_id=f"p{number}/0", instance=first)

            async def follows(tokens: list[int] = tokens, engine: int = chosen.instance_id) -> bool:
                found = await router.route(tokens, instance=second)
                return found.instance_id == engine and found.overlap_blocks == 10

            await eventually(follows)

        async def knows_of_it() -> bool:
            await router.route([7] * 160, request_id="known/0", instance=first)
            return await router.active(second) > 0

        await eventually(knows_of_it)

        # A policy that one is told, the other one takes, too.
        await router.policy(policy="least_loaded", shadow="random", instance=first)

        async def both_changed(*instances: int) -> bool:
            states = [await router.policy(instance=instance) for instance in instances]
            return {(s.policy, s.shadow) for s in states} == {("least_loaded", "random")}

        await eventually(lambda: both_changed(first, second))

        async with load(client, clients=6) as requests:
            await requests.answers(30)
            os.kill(running.processes["router0"].pid, signal.SIGSTOP)
            await requests.answers(30)
            os.kill(running.processes["router0"].pid, signal.SIGCONT)
            await requests.answers(30)
            running.processes["router1"].kill()
            await requests.answers(30)
        assert requests.failures == []

        running.start("router1")
        await running.processes["router1"].wait_ready()

        async def is_replaced() -> bool:
            routers = await router.routers()
            return len(routers) == 2 and len({first, second} & set(routers)) == 1

        await eventually(is_replaced, timeout=30)
        await asyncio.gather(*(ask(client, prompt(f"after {n}", 5)) for n in range(8)))

        async def agree_on_nothing() -> bool:
            return [await router.active(i) for i in await router.routers()] == [0, 0]

        await eventually(agree_on_nothing, timeout=30)
        assert await both_changed(*await router.routers())
