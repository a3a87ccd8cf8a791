"""In place of SGLang's package of kernels, whose build for CPUs is on no package index.

SGLang imports kernels by name when it starts, and on a CPU without AMX calls none of those that it
imports: it has torch code for them.
"""

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(f"there is no sgl_kernel.{name} on this machine")

    return missing
