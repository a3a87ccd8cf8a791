"""An engine that says what a script tells it, where a test needs a judgement no small model has.

The script is a JSON list of pairs: a regular expression, and the answer to prompts in which it is
found; the first that fits counts. All but the words is chapter 4's engine.
"""

import argparse
import asyncio
import json
import re
from collections.abc import AsyncGenerator
from pathlib import Path

from chapter4.engine import parse_args, serve
from common.engines.base import RequestContext
from common.engines.scheduled_request import schedule
from common.engines.simulated import SimulatedEngine, SimulatedSettings
from common.model_files import DEFAULT_MODEL
from common.protocol import EngineOutput, EngineTimings, GenerateRequest
from common.text import load_text_model
from common.worker import Lifecycle, run

from dynamo.runtime import DistributedRuntime, dynamo_worker

PIECE = 3  # tokens an item
VOCAB = 1 << 20


class ScriptedEngine(SimulatedEngine):
    """A simulated engine with other words."""

    def __init__(self, settings: SimulatedSettings, script: Path) -> None:
        super().__init__(settings)
        self._rules: list[tuple[str, str]] = json.loads(script.read_text())
        self._model = load_text_model(DEFAULT_MODEL)

    async def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[EngineOutput, None]:
        schedule(  # it refuses what an engine refuses
            request,
            context,
            context_length=self.info.context_length,
            vocab_size=VOCAB,
            eog_ids=frozenset(),
        )
        prompt = self._model.detokenizer().push(request.token_ids)
        answer = next((say for rule, say in self._rules if re.search(rule, prompt)), None)
        if answer is None:
            raise AssertionError(f"the script has no answer to {prompt!r}")
        tokens = self._model.encode(answer)[: request.sampling.max_tokens]
        for start in range(0, len(tokens), PIECE):
            if context.is_stopped():
                return
            yield EngineOutput(
                tokens[start : start + PIECE],
                worker_id=self.info.worker_id if start == 0 else None,
                cached_tokens=0 if start == 0 else None,
            )
            await asyncio.sleep(0)
        yield EngineOutput(finish_reason="stop", timings=EngineTimings(0.0, 0.0, 0.0))


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    (script,) = args.engine_arg
    settings = SimulatedSettings(worker_id=args.worker_id)
    await serve(runtime, args, life, ScriptedEngine(settings, Path(script)))


if __name__ == "__main__":
    args = parse_args()
    run(worker, args, f"engine-{args.worker_id}")
