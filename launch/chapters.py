"""Which components a chapter's pipeline has."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from launch.errors import LaunchError


@dataclass(frozen=True)
class Component:
    """One script of a chapter; `options` names the launcher's options it is passed."""

    name: str
    options: tuple[str, ...] = ()
    replicated: bool = False
    several: bool = False  # only if more than one is asked for, they have numbers


@dataclass(frozen=True)
class Options:
    """What the components are started with; `None` leaves the choice to the component."""

    namespace: str = "inference"
    engines: int | None = None
    routers: int = 1
    backend: str | None = None
    model: str | None = None
    policy: str | None = None
    shadow: str | None = None
    port: int = 8000


ENGINE = Component("engine", options=("backend", "model"), replicated=True)
PROCESSOR = Component("processor", options=("model",))
FRONTEND = Component("frontend", options=("port",))
ROUTER = Component("router", options=("policy",))
LABORATORY_ROUTER = Component("router", options=("policy", "shadow"), several=True)

# A chapter's components in the order of a request's way back: a component stands after
# those it calls. They stop in the opposite order.
CHAPTERS: dict[str, tuple[Component, ...]] = {
    "chapter1": (ENGINE, PROCESSOR, FRONTEND),
    "chapter2": (ENGINE, ROUTER, PROCESSOR, FRONTEND),
    "chapter3": (ENGINE, LABORATORY_ROUTER, PROCESSOR, FRONTEND),
}

ENGINES = {"chapter2": 2, "chapter3": 4}  # where one is not enough to see the lesson
EXTERNAL_BACKENDS = ("sglang", "vllm")  # they take minutes to start, and flags after --
BACKENDS = {"chapter3": "simulated"}  # where the lesson takes more engines than a laptop can run

# The policies that have a name; where there is a shadow, a function of a file will do, too.
POLICIES = {
    "chapter2": ("kv", "least_loaded", "round_robin", "random"),
    "chapter3": (
        "dynamo",
        "earliest_start",
        "kv",
        "least_loaded",
        "power_of_two",
        "random",
        "round_robin",
        "session_affinity",
    ),
}
# Where killing an engine or a router is part of the lesson, as long as another one is left.
SURVIVE = {"chapter3"}
PAGES = {"chapter3": {"Router page": "/router"}}  # besides the chat page


def components(chapter: str) -> tuple[Component, ...]:
    """The components of a chapter.

    Raises:
        LaunchError: there is no such chapter.
    """
    if chapter not in CHAPTERS:
        raise LaunchError(f"there is no {chapter!r}; the chapters are: {', '.join(CHAPTERS)}")
    return CHAPTERS[chapter]


def processes(
    chapter: str, component: Component, options: Options
) -> Iterator[tuple[str, list[str]]]:
    """Name and command of each process of a component: `engine0`, `engine1`; `frontend`."""
    command = [sys.executable, "-m", f"{chapter}.{component.name}"]
    command += ["--namespace", options.namespace]
    for option in component.options:
        value = getattr(options, option)
        if value is not None:
            command += [f"--{option}", str(value)]
    if component.several and options.routers > 1:
        for number in range(options.routers):
            yield f"{component.name}{number}", command
        return
    if not component.replicated:
        yield component.name, command
        return
    for worker_id in range(options.engines or ENGINES.get(chapter, 1)):
        yield f"{component.name}{worker_id}", [*command, "--worker-id", str(worker_id)]
