"""What one run may call, from what its request names."""

from chapter4.agent_loop import OwnTool
from chapter4.toolbox import Toolbox
from common.protocol import PipelineError
from common.protocol_agent import AgentRequest


def own_tools(request: AgentRequest, toolbox: Toolbox) -> dict[str, OwnTool]:
    """The tools that the agent runs, by name. A model can call these and the caller's functions.

    Raises:
        PipelineError: kind `invalid_request`: a set or tool does not exist, two have one name,
            one is to be called that the request does not give, or of another set than it has,
            or the budget has no room for what is to be called.
    """
    functions = {function.name for function in request.functions}
    own: dict[str, OwnTool] = {}
    for toolset in request.toolsets:
        for tool in toolbox.tools(toolset):
            if tool.name in own and own[tool.name].server == toolset.server:
                continue  # `file_search` is one of `builtin`
            if tool.name in functions or tool.name in own:
                other = own[tool.name].server if tool.name in own else "your functions"
                message = f"{tool.name!r} is in {toolset.server} and in {other}; allow one of them."
                raise PipelineError("invalid_request", message, "tools")
            own[tool.name] = OwnTool(toolset.server, tool)
    given = sorted({*functions, *own})
    named = [("tool_choice", request.tool_choice.name), *(("tool_plan", n) for n in request.plan)]
    for param, name in named:
        if name is not None and name not in given:
            there_are = ", ".join(given) or "none"
            message = f"'{param}': {name!r} is no tool of this request; there are: {there_are}."
            raise PipelineError("invalid_request", message, param)
    choice = request.tool_choice
    if choice.name is not None and choice.server is not None:
        found = own[choice.name].server if choice.name in own else "your functions"
        if found != choice.server:
            message = f"'tool_choice': {choice.name!r} is of {found}, not of {choice.server}."
            raise PipelineError("invalid_request", message, "tool_choice")
    if choice.mode == "required" and not given:
        raise PipelineError("invalid_request", "'tool_choice': There is no tool.", "tool_choice")
    forced = len(request.plan) + (choice.mode == "required")
    if forced >= request.budget.steps:
        message = f"'max_steps': {forced} forced calls and the answer take {forced + 1} steps."
        raise PipelineError("invalid_request", message, "max_steps")
    if forced > request.budget.tool_calls:
        message = f"'max_tool_calls': {forced} calls are forced."
        raise PipelineError("invalid_request", message, "max_tool_calls")
    return own
