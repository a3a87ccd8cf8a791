"""The launcher's decisions: which of several failures to tell, and what exit status to give."""

import argparse
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from launch.child import ChildFailedError
from launch.children import Children
from launch.launcher import StopSignals, _check_stopped, _until_done
from launch.pipeline import Pipeline
from tests.answering_server import server
from tests.test_children import SERVE, program

import pytest

SAYS_3 = program(
    "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(3)); ready(); signal.pause()"
)


def of_one_process(children: Children, url: str, command: Sequence[str]) -> Pipeline:
    return Pipeline(url, "ns", children, {}, processes={"engine0": children.start("a", command)})


async def test_a_broken_request_is_put_down_to_the_child_that_is_just_ending(
    children: Children,
) -> None:
    """The frontend's error arrives first; what helps is the engine's last words."""

    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        threading.Timer(0.2, os.kill, (running.processes["engine0"].pid, signal.SIGKILL)).start()
        return 500, b"engine is gone"

    with server(answer) as url:
        running = of_one_process(children, url, SERVE)
        arguments = argparse.Namespace(ask=["hi"], backend=None)
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
