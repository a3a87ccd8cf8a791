"""The launcher's decisions: which of several failures to tell, and what exit status to give."""

import argparse
import os
import signal
from collections.abc import Sequence
from typing import get_args

import chapter3.policy_loader
from common.protocol_router import Policy
from launch.arguments import parse_arguments
from launch.chapters import ENGINE, POLICIES, ROUTER, Component, Options, components, processes
from launch.child import ChildFailedError
from launch.children import Children
from launch.errors import LaunchError
from launch.launcher import StopSignals, _check_stopped, _until_done
from launch.pipeline import Pipeline
from tests.test_children import SERVE, program

import pytest

SAYS_3 = program(
    "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(3)); ready(); signal.pause()"
)


def of_one_process(children: Children, url: str, command: Sequence[str]) -> Pipeline:
    return Pipeline(url, "ns", children, {}, processes={"engine0": children.start("a", command)})


async def test_a_broken_request_is_put_down_to_the_child_that_is_just_ending(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frontend's error arrives first; what helps is the engine's last words."""
    running = of_one_process(children, "", SERVE)

    async def answer(url: str, arguments: argparse.Namespace) -> None:
        os.kill(running.processes["engine0"].pid, signal.SIGKILL)
        raise LaunchError("the pipeline answered 500: engine is gone")  # before anybody knows

    monkeypatch.setattr("launch.launcher.answer_questions", answer)
    monkeypatch.setattr("launch.launcher.CHILD_ENDS_S", 60.0)
    arguments = argparse.Namespace(chapter="chapter1", ask=["hi"], backend=None)
    with pytest.raises(ChildFailedError, match="was killed by SIGKILL"):
        await _until_done(running, arguments, StopSignals(children))


@pytest.mark.parametrize(("command", "status"), [(SERVE, 0), (SAYS_3, 1)])
async def test_a_component_that_does_not_stop_well_is_told(
    children: Children, capsys: pytest.CaptureFixture[str], command: Sequence[str], status: int
) -> None:
    running = of_one_process(children, "", command)
    await running.wait_ready()
    await running.processes["engine0"].stop()
    assert _check_stopped(running) == status
    told = "warning: while stopping, a exited with status 3" in capsys.readouterr().err
    assert told == bool(status)


@pytest.mark.parametrize(
    ("chapter", "engines", "expected"),
    [
        ("chapter1", None, 1),
        ("chapter2", None, 2),
        ("chapter3", None, 4),
        ("chapter1", 3, 3),
        ("chapter2", 1, 1),
    ],
)
def test_the_number_of_engines(chapter: str, engines: int | None, expected: int) -> None:
    """A router has something to choose from, unless the user says otherwise."""
    commands = dict(processes(chapter, ENGINE, Options(engines=engines)))
    assert list(commands) == [f"engine{number}" for number in range(expected)]
    for number, command in enumerate(commands.values()):
        assert command[-2:] == ["--worker-id", str(number)]


def test_the_policy_goes_to_the_router_alone() -> None:
    def with_policy(component: Component, options: Options) -> bool:
        ((_, command), *_) = processes("chapter2", component, options)
        return "--policy random" in " ".join(command)

    routed = [c for c in components("chapter2") if with_policy(c, Options(policy="random"))]
    assert routed == [ROUTER]
    assert not with_policy(ROUTER, Options()), "the default is the component's own"


@pytest.mark.parametrize(
    ("arguments", "environment", "engines", "backend"),
    [
        (["chapter1"], "", None, None),
        (["chapter2"], "", None, None),
        (["chapter3"], "", None, "simulated"),
        (["chapter3"], "llamacpp", None, "llamacpp"),
        (["chapter3", "--backend", "simulated"], "llamacpp", None, "simulated"),
        (["chapter3", "--engines", "2"], "", 2, "simulated"),
        (["chapter3", "--backend", "llamacpp"], "", None, "llamacpp"),
        (["chapter3", "--real", "2"], "", 2, "llamacpp"),
        (["chapter3", "--real", "2", "--backend", "llamacpp"], "simulated", 2, "llamacpp"),
        (["chapter2", "--real", "3"], "", 3, "llamacpp"),
    ],
)
def test_what_runs_on_the_engines(
    arguments: list[str],
    environment: str,
    engines: int | None,
    backend: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINE_BACKEND", environment)
    parsed = parse_arguments(arguments)
    assert (parsed.engines, parsed.backend) == (engines, backend)


def test_the_launcher_knows_the_policies_of_the_routers() -> None:
    """It runs without .venv for its help, so it cannot ask them."""
    assert set(POLICIES["chapter2"]) == set(get_args(Policy))
    assert POLICIES["chapter3"] == tuple(chapter3.policy_loader.POLICIES)
