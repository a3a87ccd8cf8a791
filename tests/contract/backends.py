"""The engines that the contract is checked with, and what each of them says it cannot do."""

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from common.engines.base import Engine
from tests.common.engines.engine_helpers import ONE_THREAD

DEFAULT_BACKENDS = ("llamacpp", "simulated")
BACKENDS = (*DEFAULT_BACKENDS, "sglang", "vllm")

# Small, so that tests can fill it.
CACHE_TOKENS = 384
MAX_RUNNING = 4
MAX_WAITING = 4


@dataclass(frozen=True)
class Backend:
    """An engine with at least `CACHE_TOKENS` of room, and how it differs from others.

    It refuses the sampling parameters in `refuses` by name. `has_model`: what it generates means
    something. `bounded`: its queue is, so that it turns requests down when it is full.
    `clears_when_idle`: its cache can be cleared only then. `continues_schemas`: it takes a JSON
    document that another engine began; `continues_seeds`: and a seed, with the same random numbers.
    """

    name: str
    start: Callable[[], Awaitable[Engine]]
    refuses: frozenset[str] = frozenset()
    has_model: bool = True
    bounded: bool = True
    clears_when_idle: bool = False
    continues_schemas: bool = True
    continues_seeds: bool = True


def backend_of(name: str, model: str | None, flags: str) -> Backend:
    """The backend of that name; `model` and `flags` are for those that are installed separately."""
    own_flags = shlex.split(flags)
    if name == "llamacpp":
        return Backend(name, _start_llamacpp)
    if name == "simulated":
        lacking = frozenset({"json_schema", "logprobs", "logit_bias"})
        return Backend(name, _start_simulated, lacking, has_model=False)
    assert model is not None, f"--backend {name} needs --engine-model"

    async def start_sglang() -> Engine:
        from common.engines.sglang import SGLangEngine

        return await SGLangEngine.start(model, 0, own_flags)

    async def start_vllm() -> Engine:
        from common.engines.vllm import VllmEngine

        return await VllmEngine.start(model, 0, own_flags)

    if name == "sglang":
        has_seeds = "--enable-deterministic-inference" in own_flags
        return Backend(
            name,
            start_sglang,
            frozenset() if has_seeds else frozenset({"seed"}),
            bounded="--max-queued-requests" in own_flags,
            clears_when_idle=True,
            continues_schemas=False,
        )
    return Backend(
        name,
        start_vllm,
        bounded="--max-num-queued-reqs" in own_flags,
        continues_schemas=False,
        continues_seeds=False,
    )


async def _start_llamacpp() -> Engine:
    from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings

    settings = LlamaCppSettings(
        cache_tokens=CACHE_TOKENS,
        max_running=MAX_RUNNING,
        max_waiting=MAX_WAITING,
        **ONE_THREAD,
    )
    return await LlamaCppEngine.start(settings)


async def _start_simulated() -> Engine:
    from common.engines.simulated import SimulatedEngine, SimulatedSettings

    settings = SimulatedSettings(
        context_length=CACHE_TOKENS,
        cache_tokens=CACHE_TOKENS,
        max_running=MAX_RUNNING,
        max_waiting=MAX_WAITING,
    )
    return await SimulatedEngine.start(settings)
