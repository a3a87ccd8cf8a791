"""The part of vLLM that the engine uses, without vLLM: modules of that name, and an `AsyncLLM`."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class GracefulHTTPError(Exception):
    pass


class VLLMClientError(Exception):
    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import vllm` give the fake."""
    vllm, sampling, exceptions = (
        ModuleType(name) for name in ("vllm", "vllm.sampling_params", "vllm.exceptions")
    )
    vars(vllm).update(SamplingParams=SimpleNamespace)
    vars(sampling).update(
        RequestOutputKind=SimpleNamespace(DELTA="delta"), StructuredOutputsParams=SimpleNamespace
    )
    vars(exceptions).update(GracefulHTTPError=GracefulHTTPError, VLLMClientError=VLLMClientError)
    for module in (vllm, sampling, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def output(
    token_ids: list[int],
    finish_reason: str | None = None,
    kv_transfer_params: dict[str, Any] | None = None,
) -> Any:
    """A `RequestOutput`."""
    return SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=token_ids, finish_reason=finish_reason, logprobs=None)],
        finished=finish_reason is not None,
        num_cached_tokens=3,
        metrics=None,
        kv_transfer_params=kv_transfer_params,
    )


Script = Callable[[Any], list[Any]]


class FakeLLM:
    """An `AsyncLLM`: `script` says what comes of a request, exceptions are raised."""

    def __init__(self, script: Script, *, has_transfer: bool = True) -> None:
        self.requests: list[tuple[list[int], Any]] = []
        self.aborted: list[str] = []
        self.errored = False
        self.reset_arguments: list[dict[str, bool]] = []
        self.can_reset = True
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 100)
        transfer = object() if has_transfer else None
        self.vllm_config = SimpleNamespace(kv_transfer_config=transfer)
        self._script = script

    async def generate(
        self, prompt: dict[str, list[int]], params: Any, name: str
    ) -> AsyncGenerator[Any, None]:
        self.requests.append((prompt["prompt_token_ids"], params))
        for step in self._script(params):
            await asyncio.sleep(0)
            if step == "wait":
                await asyncio.Event().wait()
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    async def abort(self, name: str) -> None:
        self.aborted.append(name)

    async def reset_prefix_cache(self, **arguments: bool) -> bool:
        self.reset_arguments.append(arguments)
        return self.can_reset or bool(arguments)
