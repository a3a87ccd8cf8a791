"""The engine component, whose simulated engine is slow as long as a file exists.

python -m tests.chapter1.held_engine FILE [the engine's own arguments]

A test holds a stream open with it until it has seen what it wants to see, however long that takes.
"""

import sys
from pathlib import Path

from chapter1 import engine
from common.engines.scheduler import Work
from common.engines.simulated import SimulatedEngine
from common.worker import run

HELD_STEP_S = 0.4

held = Path(sys.argv.pop(1))
original = SimulatedEngine._step_seconds


def step_seconds(self: SimulatedEngine, work: list[Work]) -> float:
    return HELD_STEP_S if held.exists() else original(self, work)


if __name__ == "__main__":
    SimulatedEngine._step_seconds = step_seconds  # type: ignore[method-assign]
    run(engine.worker, engine.parse_args(), "engine-held")
