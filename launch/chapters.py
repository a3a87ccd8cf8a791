"""Which components a chapter's pipeline has."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from launch.errors import LaunchError


@dataclass(frozen=True)
class Component:
    """One script of a chapter; `options` names the launcher's options it is passed.

    With `roles` some of its processes may compute prompts for the others.
    """

    name: str
    options: tuple[str, ...] = ()
    replicated: bool = False
    several: bool = False  # only if more than one is asked for, they have numbers
    roles: bool = False


@dataclass(frozen=True)
class Options:
    """What the components are started with; `None` leaves the choice to the component."""

    namespace: str = "inference"
    engines: int | None = None
    prefill: int = 0
    routers: int = 1
    backend: str | None = None
    model: str | None = None
    policy: str | None = None
    shadow: str | None = None
    port: int = 8000


ENGINE = Component("engine", options=("backend", "model"), replicated=True)
LABORATORY_ENGINE = Component("engine", options=("backend", "model"), replicated=True, roles=True)
PROCESSOR = Component("processor", options=("model",))
AGENT = Component("agent")
PLANNER = Component("planner")
FRONTEND = Component("frontend", options=("port",))
ROUTER = Component("router", options=("policy",))
LABORATORY_ROUTER = Component("router", options=("policy", "shadow"), several=True)

# A chapter's components in the order of a request's way back: a component stands after
# those it calls. They stop in the opposite order.
CHAPTERS: dict[str, tuple[Component, ...]] = {
    "chapter1": (ENGINE, PROCESSOR, FRONTEND),
    "chapter2": (ENGINE, ROUTER, PROCESSOR, FRONTEND),
    "chapter3": (LABORATORY_ENGINE, LABORATORY_ROUTER, PROCESSOR, FRONTEND),
    "chapter4": (LABORATORY_ENGINE, LABORATORY_ROUTER, PROCESSOR, AGENT, PLANNER, FRONTEND),
}

ENGINES = {"chapter2": 2, "chapter3": 4, "chapter4": 2}  # where one is not enough to see the lesson
EXTERNAL_BACKENDS = ("sglang", "vllm")  # they take minutes to start, and flags after --
BACKENDS = {"chapter3": "simulated"}  # where the lesson takes more engines than a laptop can run

# The policies that have a name; where there is a shadow, a function of a file will do, too.
_LABORATORY_POLICIES = (
    "dynamo",
    "earliest_start",
    "kv",
    "least_loaded",
    "power_of_two",
    "random",
    "round_robin",
    "session_affinity",
)
POLICIES = {
    "chapter2": ("kv", "least_loaded", "round_robin", "random"),
    "chapter3": _LABORATORY_POLICIES,
    "chapter4": ("agent", *_LABORATORY_POLICIES),
}
# Where killing an engine or a router is part of the lesson, as long as another one is left.
SURVIVE = {"chapter3", "chapter4"}
PAGES = {  # besides the chat page
    "chapter3": {"Router page": "/router"},
    "chapter4": {"Agent page": "/agent", "Router page": "/router"},
}
AGENTS = {"chapter4"}  # whose --ask is a task for an agent
# What the model that comes with the project must call for it, since it cannot choose.
PLAN = ("search_documents", "calculator")


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
        role = "prefill" if worker_id < options.prefill else "decode"
        roles = ["--role", role] if options.prefill and component.roles else []
        yield f"{component.name}{worker_id}", [*command, "--worker-id", str(worker_id), *roles]


def check_chapter(arguments: argparse.Namespace) -> None:
    """There is such a chapter, and it has what the launcher's flags ask for.

    Raises:
        LaunchError: it has not.
    """
    taken = {option for component in components(arguments.chapter) for option in component.options}
    if arguments.policy is not None and "policy" not in taken:
        raise LaunchError(f"--policy: {arguments.chapter} has no router")
    if arguments.shadow is not None and "shadow" not in taken:
        raise LaunchError(f"--shadow: {arguments.chapter} has no router with a second policy")
    if arguments.routers > 1 and not any(part.several for part in components(arguments.chapter)):
        raise LaunchError(f"--routers: {arguments.chapter} has at most one")
    engines = arguments.engines or ENGINES.get(arguments.chapter, 1)
    if arguments.prefill and not any(part.roles for part in components(arguments.chapter)):
        raise LaunchError(f"--prefill: the engines of {arguments.chapter} do all of their work")
    if arguments.prefill and arguments.backend == "sglang":
        raise LaunchError(
            "--prefill: all engines get the same flags, but SGLang has a --disaggregation-mode for "
            "each role; start the components one by one"
        )
    if arguments.prefill >= engines:
        raise LaunchError(
            f"--prefill {arguments.prefill}: of {engines} engines one at least must generate"
        )
