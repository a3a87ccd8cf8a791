"""A policy by its name, or from a file of the reader's: `path.py:function`."""

import importlib
import importlib.util
import uuid
from pathlib import Path

from chapter3.snapshot import Policy

POLICIES = {
    "dynamo": "dynamo",
    "earliest_start": "earliest_start",
    "kv": "kv",
    "least_loaded": "least_loaded",
    "power_of_two": "power_of_two",
    "random": "random_choice",
    "round_robin": "round_robin",
    "session_affinity": "session_affinity",
}
"""The built-in policies and the modules of `chapter3.policies` that they are in."""

DEFAULT_POLICY = "earliest_start"


def load_policy(name: str) -> Policy:
    """The policy that `name` names; a file is read anew each time.

    Raises:
        ValueError: there is no such policy, or the file cannot be run.
    """
    if name in POLICIES:
        module = importlib.import_module(f"chapter3.policies.{POLICIES[name]}")
        policy: Policy = module.policy
        return policy
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        names = ", ".join(POLICIES)
        raise ValueError(f"there is no policy {name!r}; give path.py:function or one of {names}")
    return _load_file(Path(path), function)


def _load_file(path: Path, function: str) -> Policy:
    spec = importlib.util.spec_from_file_location(f"policy_{uuid.uuid4().hex}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {error!r}") from error
    policy = getattr(module, function, None)
    if not callable(policy):
        raise ValueError(f"{path} has no function {function!r}")
    return policy  # type: ignore[no-any-return]
