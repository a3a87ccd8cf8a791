"""The engines that there are to choose from."""

from collections.abc import Collection, Iterable

from chapter4.disaggregation import stands_alone
from chapter4.health import FleetHealth
from chapter4.workers import Worker
from common.protocol import PipelineError


def decode_engines(
    workers: Iterable[Worker],
    health: FleetHealth,
    model: str,
    excluded: Collection[int],
    now: float,
) -> list[Worker]:
    """Those that may generate an answer: silent and sick ones only if there is no other.

    Raises:
        PipelineError: kind `unavailable`, there is none.
    """
    workers = list(workers)
    known = [
        worker
        for worker in workers
        if worker.synced and worker.source.info.model == model and worker.instance not in excluded
    ]
    # Engines that are there to compute prompts for others do all of it if they are alone.
    generating = [worker for worker in known if worker.source.role != "prefill"]
    known = generating or [worker for worker in known if stands_alone(worker.source)]
    if not known:
        states = ", ".join(
            f"worker {worker.source.info.worker_id} with {worker.source.info.model} is "
            + ("excluded" if worker.instance in excluded else worker.state(now))
            for worker in workers
        )
        raise PipelineError(
            "unavailable",
            f"No engine with the model {model} is ready ({states or 'there is none at all'}).",
        )
    heard = [worker for worker in known if not worker.is_silent(now)]
    well = [worker for worker in heard if health.may_serve(worker.instance)]
    found = well or heard or known
    able = [
        worker
        for worker in found
        if stands_alone(worker.source)
        or prefill_engines(workers, health, model, excluded, now, worker.source.info.backend)
    ]
    return able or found


def prefill_engines(
    workers: Iterable[Worker],
    health: FleetHealth,
    model: str,
    excluded: Collection[int],
    now: float,
    backend: str | None = None,
) -> list[Worker]:
    """Those that may compute a prompt for an engine of `backend`; there need not be any."""
    return [
        worker
        for worker in workers
        if worker.source.role == "prefill"
        and worker.source.info.model == model
        and backend in (None, worker.source.info.backend)
        and worker.instance not in excluded
        and worker.state(now) == "ready"
        and health.may_serve(worker.instance)
    ]
