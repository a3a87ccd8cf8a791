"""The tool `date_time`."""

import zoneinfo
from datetime import datetime
from typing import Annotated

from chapter4.tools import ToolError

from pydantic import Field

Timezone = Annotated[
    str, Field(max_length=64, description="an IANA name, for example Europe/Berlin")
]


def date_time(timezone: Timezone = "UTC") -> str:
    """Tell the current date, weekday and time in a time zone."""
    try:
        zone = zoneinfo.ZoneInfo(timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ToolError(f"there is no time zone {timezone!r}; names are like Asia/Tokyo") from error
    return datetime.now(zone).strftime("%A, %Y-%m-%d %H:%M:%S %Z (UTC%z)")
