"""A policy by its name, or from a file of the reader's: `path.py:function`."""

import importlib
import inspect
import runpy
from pathlib import Path

from chapter4.snapshot import Policy

POLICIES = {
    "agent": "agent",
    "dynamo": "dynamo",
    "earliest_start": "earliest_start",
    "kv": "kv",
    "least_loaded": "least_loaded",
    "power_of_two": "power_of_two",
    "random": "random_choice",
    "round_robin": "round_robin",
    "session_affinity": "session_affinity",
}
"""The built-in policies and the modules of `chapter4.policies` that they are in."""

DEFAULT_POLICY = "agent"


def load_policy(name: str) -> Policy:
    """The policy that `name` names; a file is run anew each time.

    Raises:
        ValueError: there is no such policy, or the file cannot be run.
    """
    if name in POLICIES:
        module = importlib.import_module(f"chapter4.policies.{POLICIES[name]}")
        policy: Policy = module.policy
        return policy
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        names = ", ".join(POLICIES)
        raise ValueError(f"there is no policy {name!r}; give path.py:function or one of {names}")
    return _load_file(Path(path), function)


def _load_file(path: Path, function: str) -> Policy:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        # An import could take an old version of it from the cache of compiled files.
        found = runpy.run_path(str(path), run_name="policy_file").get(function)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {error!r}") from error
    if not callable(found):
        raise ValueError(f"{path} has no function {function!r}")
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        raise ValueError(f"{function!r} in {path} is async; a policy is a plain function")
    policy: Policy = found
    return policy
