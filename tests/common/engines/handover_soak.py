"""Many handovers between two small real engines, with cancellations and peers that vanish.

    python -m tests.common.engines.handover_soak --handovers 1000

Requests are stopped, or their tasks cancelled, at random moments; descriptors are lost, or name a
prefill engine that has been closed. Afterwards every cell, loan, slot and task must be accounted
for. Prints what happened.
"""

import argparse
import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import FakeContext
from tests.common.engines.handover_helpers import (
    Peer,
    a_prompt,
    decode_request,
    prefill_request,
    two_engines,
)

CONCURRENT = 8
SAMPLING: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SMALL = {"cache_tokens": 512, "max_sequences": 12, "max_running": 6, "import_blocks": 1}


def resident_mib() -> float:
    """This process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Soak:
    """Handovers from `prefill` to `decode`; `what` counts how they ended."""

    def __init__(self, prefill: Peer, decode: Peer, seed: int) -> None:
        self.prefill, self.decode = prefill, decode
        self.what: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._left = 0

    async def run(self, handovers: int) -> None:
        self._left = handovers
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENT):
                tasks.create_task(self._keep_handing_over())

    async def _keep_handing_over(self) -> None:
        while self._left > 0:
            self._left -= 1
            context = FakeContext()
            task = asyncio.create_task(self._hand_over(context))
            how = self._rng.choice(["read", "read", "stop", "cancel"])
            if how != "read":
                await asyncio.wait([task], timeout=self._rng.expovariate(1 / 0.15))
                if how == "stop":
                    context.stop()
                else:
                    task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result
            self.what[result if isinstance(result, str) else "task cancelled"] += 1

    async def _hand_over(self, context: FakeContext) -> str:
        rng = self._rng
        prompt = a_prompt(rng.randrange(12), rng.randint(1, 40)) + [
            rng.randrange(9)
        ] * rng.randrange(3)
        sampling = {**SAMPLING, "max_tokens": rng.randint(1, 6)}
        (item,) = (await self.prefill.run(prefill_request(prompt, **sampling), context)).items
        kv = item.kv
        if kv is None:
            return f"over: {item.finish_reason}"
        fate = rng.random()
        if fate < 0.05:
            return "lost"
        if fate < 0.1 and kv.data:
            kv.data["process"] = b"of an engine before"  # it stays lent
        result = await self.decode.run(decode_request(prompt, item, kv, **sampling), context)
        return f"handed over: {result.finish_reason}"


async def soak(handovers: int, seed: int) -> str:
    """Run, check that nothing is left, and say what happened."""
    tasks = asyncio.all_tasks()
    async with two_engines(SMALL, SMALL) as (prefill, decode):
        one = Soak(prefill, decode, seed)
        await one.run(handovers // 4)  # until memory is as it will stay
        before, running = resident_mib(), asyncio.all_tasks()
        await one.run(handovers - handovers // 4)
        for transfer in list(prefill.transfer.lender._loans):  # what a lease would end later
            prefill.transfer.lender._end(transfer)
        for peer in (prefill, decode):
            await peer.check_at_rest()
        # A connection that is kept for the next fetch has a task; as many were needed at once.
        await eventually(lambda: len(asyncio.all_tasks() - running) <= CONCURRENT)
        metrics = decode.engine.metrics()
        summary = (
            f"{handovers} handovers: {dict(one.what)}; {metrics.received_tokens} tokens received, "
            f"{metrics.failed_transfers} transfers failed; {before:.0f} MiB after a quarter, "
            f"{resident_mib():.0f} MiB at the end"
        )
    assert asyncio.all_tasks() <= tasks
    return summary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--handovers", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    args = parser.parse_args()
    print(asyncio.run(soak(args.handovers, args.seed)))
