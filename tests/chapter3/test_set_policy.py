"""`scripts/set_policy`: what it shows, what it changes, and what it says when it cannot."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from pathlib import Path

from chapter3.policy_loader import DEFAULT_POLICY
from chapter3.set_policy import absolute, described
from common.protocol_routing import PolicyState
from tests.chapter1.helpers import http_client
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import ask
from tests.conftest import StartPipeline

import pytest


def test_a_file_is_named_from_the_root_and_a_name_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("mine.py:best") == f"{tmp_path}/mine.py:best"
    assert absolute(f"{tmp_path}/mine.py:best") == f"{tmp_path}/mine.py:best"
    for name in ("kv", "", "mine.py", "a:b"):
        assert absolute(name) == name


def test_the_state_in_words() -> None:
    assert described(PolicyState("kv")) == ["policy kv", "no shadow"]
    state = PolicyState(
        "a.py:f",
        "dynamo",
        failures=1,
        failure="it is broken",
        shadow_failures=3,
        shadow_failure="it is, too",
        shadowed=120,
        disagreed=14,
        regret=0.31254,
    )
    assert described(state) == [
        "policy a.py:f",
        "  failed once, the last time because it is broken",
        "shadow dynamo: would have chosen otherwise in 14 of 120 decisions; by its own score that "
        "is better by 0.3125 on average",
        "  failed 3 times, the last time because it is, too",
    ]


async def run(
    *arguments: str, environment: Mapping[str, str], cwd: Path | None = None
) -> tuple[str, str, int]:
    """The script's output, what it wrote to stderr, and its status."""
    command = (sys.executable, "-m", "chapter3.set_policy", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **environment}, cwd=cwd, stdout=PIPE, stderr=PIPE
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return output.decode(), errors.decode(), process.returncode


async def test_policies_of_all_routers_are_shown_and_changed(
    start_pipeline: StartPipeline, router_of: RouterOf, servers: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def second(snapshot):\n    return [worker.worker_id == 1 for worker in snapshot.workers]\n"
    )
    # What is killed is listed until a busy test has looked.
    long_lease = {**servers, "ETCD_LEASE_TTL": "60"}
    async with (
        start_pipeline(chapter="chapter3", engines=2, environment=long_lease) as p,
        http_client(p.url) as client,
    ):
        await router_of(p).wait_ready()

        async def policies(*arguments: str, status: int = 0) -> tuple[list[str], str]:
            found = await run(
                *arguments, "--namespace", p.namespace, environment=servers, cwd=tmp_path
            )
            assert found[2] == status, found
            return found[0].splitlines(), found[1]

        assert (await policies())[0] == [f"policy {DEFAULT_POLICY}", "no shadow"]
        shown, _ = await policies("mine.py:second", "--shadow", "round_robin")
        assert shown[0] == f"policy {tmp_path}/mine.py:second"
        assert shown[1].startswith("shadow round_robin: would have chosen otherwise in 0 of 0 ")
        for number in range(4):
            assert (await ask(client, f"question {number}")).worker == 1
        shown, _ = await policies()
        assert " of 4 decisions" in shown[1]

        _, errors = await policies("magic", status=1)
        assert "error: policy: there is no policy 'magic'; give" in errors
        _, errors = await policies("--shadow", "gone.py:f", status=1)
        assert f"error: shadow: there is no file {tmp_path}/gone.py" in errors
        assert (await policies())[0][0] == f"policy {tmp_path}/mine.py:second"

        p.commands["router2"] = p.commands["router"]
        p.tiers.append(["router2"])
        await p.start("router2").wait_ready()
        shown, _ = await policies("kv", "--no-shadow")
        assert [line for line in shown if not line.startswith("router ")] == [
            "policy kv",
            "no shadow",
        ] * 2

        p.processes["router2"].kill()
        await p.processes["router2"].wait()
        shown, errors = await policies()
        assert shown[1:] == ["policy kv", "no shadow"]
        assert "does not answer" in errors


async def test_without_a_router_it_says_so(namespace: str, servers: dict[str, str]) -> None:
    output, errors, status = await run("kv", "--namespace", namespace, environment=servers)
    assert status == 1
    assert not output
    assert (
        f"error: no router with the endpoint router.policy is up in the namespace {namespace}"
        in errors
    )


@pytest.mark.parametrize("arguments", [("--shadow", "kv", "--no-shadow"), ("kv", "dynamo")])
async def test_contradictory_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    _, errors, status = await run(*arguments, environment={})
    assert status == 2
    assert "usage: set_policy" in errors
