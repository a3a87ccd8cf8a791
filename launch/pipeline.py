"""A chapter's pipeline as real processes: started at once, stopped in order."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from launch.chapters import Options, components, processes
from launch.child import READY_TIMEOUT, STOP_TIMEOUT, Child, ChildFailedError
from launch.children import Children
from launch.ports import LOOPBACK

# Once a component has crashed, the others may wait in vain for it while they drain.
STOP_TIMEOUT_AFTER_FAILURE = 3.0


@dataclass
class Pipeline:
    """A pipeline's URL and its processes by name, in starting order.

    `commands` has the command of every process, started or not; `tiers` their names, one list
    a component.
    """

    url: str
    namespace: str
    children: Children
    environment: Mapping[str, str]
    commands: dict[str, list[str]] = field(default_factory=dict)
    tiers: list[list[str]] = field(default_factory=list)
    processes: dict[str, Child] = field(default_factory=dict)

    def start(self, name: str) -> Child:
        """Start one process, for the first time or after it has ended; does not wait."""
        if name in self.processes:
            self.processes[name].start_again()
        else:
            self.processes[name] = self.children.start(name, self.commands[name], self.environment)
        return self.processes[name]

    @property
    def ready(self) -> bool:
        """Whether every started process has said that it serves."""
        return all(child.ready.done() for child in self.processes.values())

    async def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until every started process is ready.

        Raises:
            ChildFailedError: one ended first, or was not ready in time.
        """
        waits = [
            asyncio.create_task(child.wait_ready(timeout)) for child in self.processes.values()
        ]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()

    def has_replica(self, name: str) -> bool:
        """Whether another process of the same component is running."""
        tier = next((tier for tier in self.tiers if name in tier), [])
        others = [self.processes[other] for other in tier if other in self.processes]
        return any(child.name != name and not child.exited.done() for child in others)

    def kill(self) -> None:
        """SIGKILL to every process; does not wait."""
        for child in self.processes.values():
            child.kill()

    async def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop the frontend first, then what it calls; the replicas of a component together."""
        for tier in reversed(self.tiers):
            started = [self.processes[name] for name in tier if name in self.processes]
            await asyncio.gather(*(child.stop(timeout) for child in started))


@asynccontextmanager
async def pipeline(
    children: Children,
    environment: Mapping[str, str],
    chapter: str,
    options: Options,
    *,
    start: Sequence[str] | None = None,
    arguments: Mapping[str, Sequence[str]] | None = None,
) -> AsyncIterator[Pipeline]:
    """Start a chapter's components all at once; they are stopped at the end of the block.

    `environment` names the servers (see `servers.server_environment`). `start` names the
    processes to start now, by default all. `arguments` adds command-line arguments by
    component. The block begins before the components are ready: see `Pipeline.wait_ready`.
    """
    running = Pipeline(
        f"http://{LOOPBACK}:{options.port}", options.namespace, children, environment
    )
    for component in components(chapter):
        extra = (arguments or {}).get(component.name, ())
        commands = {
            name: [*command, *extra] for name, command in processes(chapter, component, options)
        }
        running.commands.update(commands)
        running.tiers.append(list(commands))
    stop_timeout = STOP_TIMEOUT
    try:
        for name in running.commands if start is None else start:
            running.start(name)
        yield running
    except ChildFailedError:
        stop_timeout = STOP_TIMEOUT_AFTER_FAILURE
        raise
    finally:
        await running.stop(stop_timeout)
