"""SGLang's `Engine` object and its processes: started, watched, ended."""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from common.engines.sglang_settings import SGLangSettings, own_logging, sglang_settings

import psutil

EXIT_GRACE_S = 10.0

_log = logging.getLogger(__name__)
_running = threading.Lock()


class SGLangProcess:
    """Made by `start`; `died` is called, with the reason, when SGLang cannot go on.

    SGLang's own ways to notice and to end its processes are not used: they kill every child of
    this process, whoever started it, or this process itself.
    """

    engine: Any
    settings: SGLangSettings

    def __init__(self, died: Callable[[BaseException], None]) -> None:
        self._died = died
        self._loop = asyncio.get_running_loop()
        # The scheduler dies with the thread that started it, which therefore lives as long.
        self._thread = ThreadPoolExecutor(1, "sglang")
        self._folder = Path(tempfile.mkdtemp(prefix="sglang-"))
        self._before = set(multiprocessing.active_children())
        self._children: list[BaseProcess] = []
        self._receiving: asyncio.Task[None] | None = None
        self._stopping = False

    @classmethod
    async def start(
        cls, model: str, flags: list[str], died: Callable[[BaseException], None]
    ) -> Self:
        """Load the model.

        Raises:
            ValueError: a flag is wrong, or SGLang cannot start; what it says is on stderr.
        """
        if not _running.acquire(blocking=False):
            raise ValueError("SGLang can run once in a process; start another engine component")
        process = cls(died)
        launching = process._loop.run_in_executor(process._thread, process._launch, model, flags)
        try:
            await asyncio.shield(launching)
            process._watch()
        except BaseException:
            process._stopping = True
            while not launching.done():
                process._kill()  # which is what ends the waiting for it
                await asyncio.wait([launching], timeout=0.1)
            await process.close()
            raise
        return process

    @property
    def total_tokens(self) -> int:
        """How many tokens' KV there is room for."""
        infos = self.engine._scheduler_init_result.scheduler_infos
        return min(int(info["max_total_num_tokens"]) for info in infos)

    async def close(self) -> None:
        """End SGLang's processes and remove its files."""
        self._stopping = True
        for child in self._children:
            self._loop.remove_reader(child.sentinel)
        if self._receiving is not None:
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
                self._loop.remove_signal_handler(signal.SIGQUIT)
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        await self._loop.run_in_executor(self._thread, self._end)
        self._thread.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR") == str(self._folder):
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
        _running.release()

    def _launch(self, model: str, flags: list[str]) -> None:
        # SGLang wants a folder for its metrics' files, and would leave one behind.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", str(self._folder))
        logging.getLogger("sglang").setLevel(logging.WARNING)
        self.settings = sglang_settings(model, flags, self._folder)
        policy = asyncio.get_event_loop_policy()
        from common.engines.sglang_child import SchedulerSampling, run_scheduler

        from sglang.srt.entrypoints.engine import Engine

        asyncio.set_event_loop_policy(policy)

        class OwnEngine(Engine):  # type: ignore[misc]
            run_scheduler_process_func = staticmethod(run_scheduler)

            @classmethod
            def _launch_detokenizer_subprocesses(cls, **_: Any) -> tuple[list[Any], list[str]]:
                return [], []

            def shutdown(self) -> None:
                pass

        if self._stopping:
            return
        try:
            with own_logging():
                self.engine = OwnEngine(server_args=self.settings.server_args)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"SGLang could not start: {error}") from error
        level = self.settings.server_args.log_level.upper()
        logging.getLogger("sglang").setLevel(level)
        manager = self.engine.tokenizer_manager
        manager.sampling_params_class = SchedulerSampling
        manager._subprocess_watchdog.stop()

    def _watch(self) -> None:
        self._children = self._own_children()
        for child in self._children:
            self._loop.add_reader(child.sentinel, self._exited, child)
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            # How a scheduler says that it failed; nobody else may take it for his own end.
            self._loop.add_signal_handler(signal.SIGQUIT, self._quit)
        # What `auto_create_handle_loop` does, without signal handlers that end this process.
        manager = self.engine.tokenizer_manager
        manager.event_loop = self._loop
        self._receiving = asyncio.create_task(manager.handle_loop())
        self._receiving.add_done_callback(self._received)

    def _exited(self, child: BaseProcess) -> None:
        self._loop.remove_reader(child.sentinel)
        child.join()
        self._report(RuntimeError(f"SGLang's scheduler ended with status {child.exitcode}"))

    def _quit(self) -> None:
        self._report(RuntimeError("SGLang's scheduler failed; its log says why"))

    def _received(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        if not self._stopping:
            self._died(error)

    def _own_children(self) -> list[BaseProcess]:
        return [child for child in multiprocessing.active_children() if child not in self._before]

    def _end(self) -> None:
        """Ask the scheduler to leave, end what is left of it, and let go of the sockets."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            manager = engine.tokenizer_manager
            if all(child.is_alive() for child in self._children):
                from sglang.srt.managers.io_struct import ShutdownReq

                manager._dispatch_to_scheduler(ShutdownReq())
                for child in self._children:
                    child.join(EXIT_GRACE_S)
        self._kill()
        if engine is None:
            return
        engine.send_to_rpc.close(linger=0)
        engine.loop.close()
        for socket in (manager.recv_from_detokenizer, manager.send_to_scheduler):
            socket.close(linger=0)
        from sglang.srt.managers.load_snapshot import shm_path_for

        Path(shm_path_for(engine.port_args.instance_id)).unlink(missing_ok=True)
        for name in dir(engine.port_args):
            address = getattr(engine.port_args, name)
            if name.endswith("_ipc_name") and address:
                Path(address.removeprefix("ipc://")).unlink(missing_ok=True)

    def _kill(self) -> None:
        for child in self._children or self._own_children():
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(child.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            child.kill()
            child.join()
