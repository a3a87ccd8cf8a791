"""Logs: readable in a terminal, JSON on request, the request id in every line about a request."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

from pythonjsonlogger.json import JsonFormatter

log = logging.getLogger("pipeline")

# What clients send may be quoted in a line; it must not begin another one, or move the cursor.
_CONTROL = (*range(32), *range(127, 160), 0x2028, 0x2029)
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROL}


class _ReadableFormatter(logging.Formatter):
    """`12:00:01.123 INFO  engine-0 message [request id]`."""

    def __init__(self, component: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)-5s {component} %(message)s", datefmt="%H:%M:%S"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        line = super().formatMessage(record).translate(_ESCAPED)
        request_id = getattr(record, "request_id", None)
        return f"{line} [{request_id}]" if request_id else line


def setup_logging(component: str, level: str, *, json: bool) -> None:
    """Send this process's logs to stderr, as text or as one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    if json:
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "target"},
                static_fields={"component": component},
            )
        )
    else:
        handler.setFormatter(_ReadableFormatter(component))
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # our own lines say as much
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _RequestLogger(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


def request_log(request_id: str | None) -> logging.LoggerAdapter[logging.Logger]:
    """A logger whose every line carries the request's id."""
    return _RequestLogger(log, {"request_id": request_id})
