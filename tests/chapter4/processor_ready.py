"""When a processor of a test answers."""

from common.protocol import InfoOutput
from launch.pipeline import Pipeline
from tests.chapter1.helpers import eventually
from tests.chapter2.helpers import RuntimeCaller


async def processor_answers(caller: RuntimeCaller, running: Pipeline) -> None:
    """Wait for it: it is listed a moment before NATS knows of it."""

    async def answers() -> bool:
        try:
            (info,) = await caller.call(
                f"{running.namespace}.processor.info", {"wait": True}, InfoOutput
            )
        except RuntimeError:
            return False
        return info.error is None

    await eventually(answers)
