"""Policies of a running pipeline: named, swapped, in the shadow."""

from pathlib import Path

from tests.chapter1.helpers import http_client
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import Router, ask, prompt
from tests.conftest import StartPipeline

import httpx


async def test_a_policy_is_swapped_while_requests_run(
    api: httpx.AsyncClient, router: Router, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def last(snapshot):\n    return [worker.worker_id for worker in snapshot.workers]\n"
    )
    before = await router.policy()
    assert before.policy == "earliest_start"
    try:
        changed = await router.policy(policy=f"{mine}:last", shadow="least_loaded")
        assert (changed.policy, changed.shadow) == (f"{mine}:last", "least_loaded")
        workers = {(await ask(api, prompt(f"swapped{n}", 20))).worker for n in range(6)}
        assert workers == {3}
        state = await router.policy()
        assert state.shadowed == 6
    finally:
        assert (await router.policy(policy=before.policy, shadow="")).shadow == ""


async def test_a_policy_that_cannot_be_loaded_changes_nothing(router: Router) -> None:
    state = await router.policy(policy="magic")
    assert state.error is not None
    assert "there is no policy 'magic'; give path.py:function or one of" in state.error.message
    assert state.error.param == "policy"
    assert (await router.policy()).policy == "earliest_start"


async def test_a_policy_that_fails_is_counted_and_nobody_suffers(
    start_pipeline: StartPipeline, router_of: RouterOf, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(snapshot):\n    return [1 / 0]\n")
    arguments = {"router": ["--policy", f"{broken}:broken"]}
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        await router_of(running).wait_ready()
        await ask(client, "an answer all the same")
        assert (await router_of(running).policy()).failures >= 1
