"""A process's end of NIXL: https://github.com/ai-dynamo/nixl/blob/main/docs/python_api.md."""

import importlib
import os
from typing import Any

from common.errors import ComponentError

import numpy as np
from numpy.typing import NDArray


def make_agent(name: str) -> Any:
    """A `nixl_agent`, whose methods only one thread may call at a time; the import takes seconds.

    Raises:
        ComponentError: NIXL is not installed, or does not work here.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    try:
        api: Any = importlib.import_module("nixl._api")
    except ImportError as error:
        raise ComponentError(
            f"--kv-transfer nixl needs NIXL ({error}): pip install 'dynamo-pipelines[nixl]', "
            "or take --kv-transfer zmq"
        ) from error
    try:
        return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
    except Exception as error:  # of its bindings' own types
        raise ComponentError(f"NIXL does not work here: {error}") from error


def register(agent: Any, memory: NDArray[np.uint8]) -> Any:
    """What `deregister_memory` wants back."""
    return agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
