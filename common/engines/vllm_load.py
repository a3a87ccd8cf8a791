"""Starts vLLM with the flags of its own command line, in a process that cannot be left behind."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

from common.engines.child_guard import ChildGuard

CPU_BLOCK_SIZE = 32  # the smallest that vLLM recommends there; its default, 128, shares little
CHILDREN_CHECK_S = 0.2
SHUTDOWN_TIMEOUT_S = 10.0  # after it, vLLM's processes are killed


def engine_args(model: str, flags: list[str], events: dict[str, Any]) -> Any:
    """The `AsyncEngineArgs` of vLLM's own flags, with what our engine needs.

    Raises:
        ValueError: vLLM has no such flag, or it is ours to set.
    """
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))

    def refuse(message: str) -> None:
        raise ValueError(f"vLLM's flags after --: {message}")

    parser.error = refuse
    parsed = parser.parse_args(flags)
    for name in ("model", "kv_events_config", "data_parallel_size"):
        if getattr(parsed, name, None) != parser.get_default(name):
            hint = {"model": "give it before --", "kv_events_config": "the engine sets it"}
            refuse(f"--{name.replace('_', '-')}: {hint.get(name, 'start one engine a rank')}")
    parsed.model = model
    args = AsyncEngineArgs.from_cli_args(parsed)
    args.disable_log_stats = True  # of vLLM's own loggers; ours keeps the figures coming
    args.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", **events)
    if args.structured_outputs_config.backend == "auto":
        args.structured_outputs_config.backend = "guidance"  # which is llguidance
    if current_platform.is_cpu() and args.block_size is None:
        args.block_size = CPU_BLOCK_SIZE
    return args


async def load(args: Any, stat_logger: Any, guard: ChildGuard) -> Any:
    """The `AsyncLLM`; its processes are under guard from their first moment on.

    Raises:
        ValueError: vLLM cannot run the model (the message has its reason).
    """
    # The runtime has threads, of which a forked process would have the locks but not the threads.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # It leaves files there when its processes are killed, and its sockets always.
    folders = {"TMPDIR": guard.folder, "VLLM_RPC_BASE_PATH": guard.folder}
    before = {name: os.environ[name] for name in folders if name in os.environ}
    # Where PyTorch keeps what it has compiled, also when another folder is the one for the rest.
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compiled)
    os.environ.update(folders)
    loading = asyncio.create_task(asyncio.to_thread(_without_interrupt, _load, args, stat_logger))
    try:
        while not loading.done():
            guard.watch()
            await asyncio.wait({loading}, timeout=CHILDREN_CHECK_S)
    except asyncio.CancelledError:
        while not loading.done():
            guard.kill()  # upon which vLLM gives up, if it has not just begun
            await asyncio.wait({loading}, timeout=CHILDREN_CHECK_S)
        if loading.exception() is None:
            await shut_down(loading.result())
        raise
    finally:
        for name in folders:
            del os.environ[name]
        os.environ.update(before)
    error = loading.exception()
    if isinstance(error, Exception):
        raise ValueError(f"vLLM cannot run {args.model}: {' '.join(str(error).split())}") from error
    guard.watch()
    return loading.result()


async def shut_down(llm: Any) -> None:
    """End vLLM's processes and wait until they are gone."""
    if llm.output_handler is not None:
        llm.output_handler.cancel()  # it would take the end for a failure
    await asyncio.to_thread(llm.shutdown, SHUTDOWN_TIMEOUT_S)


def _load(args: Any, stat_logger: Any) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(args, stat_loggers=[lambda config, rank: stat_logger])


def _without_interrupt(function: Callable[..., Any], *args: Any) -> Any:
    """Call it so that the processes it starts do not see a terminal's Ctrl-C.

    They would end at once, but the requests in flight are to be finished first. A signal mask is
    inherited by processes, a handler is not. (Python lifts it when it starts its resource tracker,
    so that has to be there before.)
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return function(*args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
