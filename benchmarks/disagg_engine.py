"""Chapter 3's engine, real or simulated, which also writes down when it does what.

    DISAGG_RECORDS=FOLDER python -m benchmarks.disagg_engine --worker-id 0 --role prefill

A line of JSON a record, in a file of its own. Times are those of `time.perf_counter`, a clock
that all processes of a machine share. All modes of the benchmark pay for the recording.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from chapter3.engine import parse_args, worker
from common.engines import simulated
from common.engines.base import RequestContext
from common.engines.kv_handover import KvHandover
from common.engines.llama_context import LlamaContext
from common.engines.llamacpp import LlamaCppEngine
from common.engines.scheduled_request import ScheduledRequest
from common.engines.scheduler import Scheduler, Work
from common.engines.simulated import SimulatedEngine
from common.kv_transfer.borrower import Borrower
from common.kv_transfer.pieces import KvPieces
from common.protocol import GenerateRequest
from common.worker import run

FOLDER = "DISAGG_RECORDS"
Function = Callable[..., Any]
now = time.perf_counter


class Recorder:
    """Wraps what an engine does. The step belongs to who computes it, the rest to the loop."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._step: dict[str, Any] = {}

    def write(self, kind: str, **record: Any) -> None:
        # One system call a line, for both threads write.
        self._file.write(json.dumps({"kind": kind, **record}).encode() + b"\n")

    def wrappers(self, backend: str) -> list[tuple[Any, str, Callable[[Function], Function]]]:
        """What is wrapped: classes or modules, names of their functions, and by what."""
        steps: list[tuple[Any, str, Callable[[Function], Function]]] = [
            (Scheduler, "drop_stopped", self._step_begins),
            (Scheduler, "plan", self._plan),
            (Scheduler, "add_output", self._token),
        ]
        if backend == "simulated":
            return [
                *steps,
                (SimulatedEngine, "generate", self._arrival),
                (simulated, "receive", self._received),
            ]
        return [
            *steps,
            (LlamaCppEngine, "generate", self._arrival),
            (KvHandover, "receive", lambda receive: self._received(receive, of_method=True)),
            (Borrower, "fetch", self._fetch),
            (Scheduler, "metrics", self._step_ends),
            (LlamaContext, "import_kv", self._seconds("import_kv_s")),
            (LlamaContext, "export_kv", self._seconds("export_kv_s")),
        ]

    def install(self, backend: str) -> None:
        for owner, name, wrapper in self.wrappers(backend):
            setattr(owner, name, wrapper(getattr(owner, name)))

    def _arrival(self, generate: Function) -> Function:
        def wrapped(engine: Any, request: GenerateRequest, context: RequestContext) -> Any:
            self.write(
                "arrived",
                id=_id(context),
                at=now(),
                prompt=len(request.token_ids) - request.generated,
                prefill_only=request.prefill_only,
            )
            return generate(engine, request, context)

        return wrapped

    def _received(self, receive: Function, *, of_method: bool = False) -> Function:
        async def wrapped(*args: Any) -> None:
            await receive(*args)
            request: ScheduledRequest = args[1 if of_method else 0]
            self.write("received", id=_id(request.context), at=now())

        return wrapped

    def _fetch(self, fetch: Function) -> Function:
        async def wrapped(*args: Any) -> KvPieces:
            begin = now()
            pieces: KvPieces = await fetch(*args)
            self.write("fetched", begin=begin, end=now(), bytes=pieces.size)
            return pieces

        return wrapped

    def _step_begins(self, drop_stopped: Function) -> Function:
        def wrapped(scheduler: Scheduler) -> Any:
            self._end_step()  # a simulated engine does nothing between two of them
            self._step = {"begin": now(), "sampled": []}
            return drop_stopped(scheduler)

        return wrapped

    def _plan(self, plan: Function) -> Function:
        def wrapped(scheduler: Scheduler) -> list[Work]:
            work: list[Work] = plan(scheduler)
            imports = [item for item in work if item.received is not None]
            computed = [len(item.tokens) for item in work if item.received is None]
            self._step |= {
                "decodes": computed.count(1),
                "prefill": sum(count for count in computed if count > 1),
                "imports": len(imports),
                "imported": list({_id(item.request.context) for item in imports}),
            }
            return work

        return wrapped

    def _token(self, add_output: Function) -> Function:
        def wrapped(scheduler: Scheduler, request: ScheduledRequest, token: int) -> Any:
            self._step["sampled"].append(_id(request.context))
            self._step["sampled_at"] = now()
            return add_output(scheduler, request, token)

        return wrapped

    def _step_ends(self, metrics: Function) -> Function:
        def wrapped(scheduler: Scheduler) -> Any:
            self._end_step()
            return metrics(scheduler)

        return wrapped

    def _end_step(self) -> None:
        step, self._step = self._step, {}
        if any(step.get(name) for name in ("decodes", "prefill", "imports")):
            self.write("step", **step, end=now())

    def _seconds(self, name: str) -> Callable[[Function], Function]:
        """What a step spends in a function."""

        def timed(function: Function) -> Function:
            @functools.wraps(function)
            def wrapped(*args: Any) -> Any:
                begin = now()
                try:
                    return function(*args)
                finally:
                    self._step[name] = self._step.get(name, 0.0) + now() - begin

            return wrapped

        return timed


def _id(context: RequestContext) -> str:
    return context.id() or ""


def main() -> None:
    args = parse_args()
    if args.backend not in ("llamacpp", "simulated"):
        raise SystemExit(f"--backend {args.backend} is neither llamacpp nor simulated")
    path = Path(os.environ[FOLDER]) / f"engine{args.worker_id}-{os.getpid()}.jsonl"
    with FileIO(path, "a") as file:
        Recorder(file).install(args.backend)
        run(worker, args, f"engine-{args.worker_id}")


if __name__ == "__main__":
    main()
