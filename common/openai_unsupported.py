"""Members of OpenAI's API that this server knows and refuses.

Each has the values, beside null, that ask for nothing and are therefore accepted. Source:
https://platform.openai.com/docs/api-reference/chat/create and `/completions`.
"""

from collections.abc import Mapping
from typing import Any

PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Of a request. What speaks of tools asks for nothing because there are never any."""

MESSAGE_MEMBERS: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}

STREAM_OPTIONS: Mapping[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}

_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "tool_calls", "tool_call_id")
TOOL_PARAMETERS = {name: values for name, values in PARAMETERS.items() if name not in _OF_TOOLS}
TOOL_MESSAGE_MEMBERS = {
    name: values for name, values in MESSAGE_MEMBERS.items() if name not in _OF_TOOLS
}
"""What is still refused where there are tools."""
