"""What single values of a request may be, and the forms in which OpenAI's API lets them come."""

import re
from typing import Annotated, Any

from common.openai_fields import bad_value

from pydantic import BeforeValidator, Field

MAX_TOKEN_ID = 2**31 - 1
_DECIMAL = "^(0|[1-9][0-9]{0,9})$"

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[
    str,
    # The Unicode categories Cc, Zl and Zp; not by name, which only some regex dialects know.
    Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"),
]
"""Text that goes to the log, so it must not look like several lines."""
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _plain_number(key: Any) -> int:
    if not isinstance(key, str) or not re.fullmatch(_DECIMAL, key):
        raise bad_value("A token id is a plain decimal number.")
    return int(key)


def _list_of_stops(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _one_prompt(prompt: Any) -> Any:
    """A string or a list of token ids; a batch of exactly one prompt is that prompt."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise bad_value(f"One prompt a request is supported, not {len(prompt)}.")
        prompt = prompt[0]
    if isinstance(prompt, list):
        for index, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
                raise bad_value("A token id is an integer from 0 to 2147483647.", index)
    elif not isinstance(prompt, str):
        raise bad_value("A prompt is a string or a list of token ids.")
    if not prompt:
        raise bad_value("The prompt must not be empty.")
    return prompt


TokenKey = Annotated[
    TokenId,
    BeforeValidator(_plain_number, json_schema_input_type=Annotated[str, Field(pattern=_DECIMAL)]),
]
"""A token id as the name of a JSON member, where another spelling would name it twice."""

Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(_list_of_stops, json_schema_input_type=str | list[str]),
]

Prompt = Annotated[str | list[TokenId], BeforeValidator(_one_prompt)]
