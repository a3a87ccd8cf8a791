"""The engine component with a fault: its simulated engine fails after some steps.

python -m tests.chapter1.failing_engine STEPS [the engine's own arguments]
"""

import itertools
import sys

from chapter1 import engine
from common.engines.scheduler import Work
from common.engines.simulated import SimulatedEngine
from common.worker import run

steps = itertools.count()
limit = int(sys.argv.pop(1))
original = SimulatedEngine._step_seconds


def fail_in_time(self: SimulatedEngine, work: list[Work]) -> float:
    if next(steps) == limit:
        raise MemoryError("out of memory (injected)")
    return original(self, work)


if __name__ == "__main__":
    SimulatedEngine._step_seconds = fail_in_time  # type: ignore[method-assign]
    run(engine.worker, engine.parse_args(), "engine-failing")
