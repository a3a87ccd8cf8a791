"""How a failure travels between components, and what the runtime's own failures mean."""

from typing import Literal

import msgspec

ErrorKind = Literal[
    "invalid_request",  # the caller must change the request
    "too_large",  # the body is over the frontend's limit
    "model_not_found",
    "not_found",  # something else that the caller named
    "conflict",  # another request is changing the same thing; this one changed nothing
    "overloaded",  # try again later
    "unavailable",  # a component behind this one is missing or died
    "internal",
]


class ErrorInfo(msgspec.Struct, omit_defaults=True):
    """Why a request failed; travels in-band so that every hop keeps the kind.

    `param` names the request field at fault, if there is one. `retry_after_s` is when trying
    again may help, where somebody can tell. `code` is OpenAI's, where the kind does not imply it.
    """

    kind: ErrorKind
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    code: Literal["context_length_exceeded"] | None = None


class PipelineError(Exception):
    """An `ErrorInfo` as an exception, for code on one side of a hop."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        param: str | None = None,
        *,
        retry_after_s: float | None = None,
        code: Literal["context_length_exceeded"] | None = None,
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(kind, message, param, retry_after_s, code)

    @classmethod
    def of(cls, info: ErrorInfo) -> "PipelineError":
        after = info.retry_after_s
        return cls(info.kind, info.message, info.param, retry_after_s=after, code=info.code)


def hop_error(error: Exception, component: str) -> ErrorInfo:
    """Classify what a runtime client raised while calling `component`.

    The runtime raises `ValueError` or `Exception` whose text begins with the kind of fault:
    "Unavailable: ..." when there is no instance or the stream broke off, "InvalidRequest: ..."
    and "Internal: ..." when the handler raised.
    """
    text = str(error)
    if "payload is too large" in text:
        return ErrorInfo("too_large", f"The request is too large to be sent to the {component}.")
    if text.startswith("Unavailable"):
        return ErrorInfo("unavailable", f"The {component} is unavailable: {text}")
    return ErrorInfo("internal", f"The {component} failed: {text}")
