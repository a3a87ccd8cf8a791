"""Members of POST /v1/responses that this server knows and refuses; see `openai_unsupported`.

Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from collections.abc import Mapping
from typing import Any

NoOps = Mapping[str, tuple[Any, ...]]

PARAMETERS: NoOps = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "image": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": ({},),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
}
CONVERSATION: NoOps = {"items": ([],)}
TEXT: NoOps = {"verbosity": ("medium",)}

FUNCTION: NoOps = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (),
}
MCP: NoOps = {
    "allowed_callers": (["direct"],),
    "authorization": (),
    "connector_id": (),
    "defer_loading": (False,),
    "headers": ({},),
    "server_description": (),
    "server_url": (),
    "tunnel_id": (),
}
MCP_FILTER: NoOps = {"read_only": (False,)}
CODE_INTERPRETER: NoOps = {"allowed_callers": (["direct"],)}
CONTAINER: NoOps = {"file_ids": ([],), "memory_limit": (), "network_policy": ()}
FILE_SEARCH: NoOps = {"filters": (), "max_num_results": (), "ranking_options": ()}

OUTPUT_TEXT: NoOps = {"annotations": ([],), "logprobs": ([],)}
FUNCTION_CALL: NoOps = {"async": (False,), "caller": (), "namespace": ()}
FUNCTION_OUTPUT: NoOps = {"caller": (), "name": (), "namespace": ()}
MCP_CALL: NoOps = {"approval_request_id": ()}
SEARCH_RESULT: NoOps = {"attributes": ({},), "file_id": (), "filename": (), "score": ()}
