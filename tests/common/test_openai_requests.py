"""Every parameter is honoured or refused by name."""

import json
from typing import Any

from common.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
    request_body_docs,
    to_process_request,
)
from common.openai_unsupported import MESSAGE_MEMBERS, PARAMETERS
from common.protocol import (
    ChatMessage,
    ErrorInfo,
    PipelineError,
    ProcessRequest,
    SamplingParams,
    to_wire,
)

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsBase as ChatParams,
)
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

USER = {"role": "user", "content": "hi"}


def chat(**parameters: Any) -> ProcessRequest:
    body = {"model": "m", "messages": [USER], **parameters}
    return to_process_request(parse_chat(json.dumps(body).encode()))


def completion(**parameters: Any) -> ProcessRequest:
    body = {"model": "m", "prompt": "Once", **parameters}
    return to_process_request(parse_completion(json.dumps(body).encode()))


def refusal(parse: Any, body: bytes) -> ErrorInfo:
    with pytest.raises(PipelineError) as caught:
        parse(body)
    assert caught.value.info.kind == "invalid_request"
    return caught.value.info


def chat_refusal(**parameters: Any) -> ErrorInfo:
    body = {"model": "m", "messages": [USER], **parameters}
    return refusal(parse_chat, json.dumps(body).encode())


def completion_refusal(**parameters: Any) -> ErrorInfo:
    body = {"model": "m", "prompt": "Once", **parameters}
    return refusal(parse_completion, json.dumps(body).encode())


def test_defaults_are_openais() -> None:
    assert chat() == ProcessRequest("m", messages=[ChatMessage("user", "hi")])
    assert chat().sampling == SamplingParams(temperature=1.0, max_tokens=None)
    assert completion() == ProcessRequest(
        "m", prompt="Once", sampling=SamplingParams(max_tokens=16)
    )


def test_null_means_the_default() -> None:
    fields = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    assert chat(**dict.fromkeys(fields | set(PARAMETERS))) == chat()
    fields = set(CompletionRequest.model_fields) - {"model", "prompt"}
    assert completion(**dict.fromkeys(fields | set(PARAMETERS))) == completion()


def test_every_sampling_parameter_reaches_the_engine() -> None:
    honoured = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": -(2**63),
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
    }
    request = chat(**honoured, logit_bias={"9": -100, "10": 2.5}, stop=["a", "b"])
    expected = SamplingParams(**honoured, logit_bias=[(9, -100.0), (10, 2.5)])  # type: ignore[arg-type]
    assert request.sampling == expected
    assert request.stop == ["a", "b"]
    assert completion(**honoured).sampling == SamplingParams(**honoured)  # type: ignore[arg-type]


def test_other_ways_to_say_it() -> None:
    assert chat(stop="END").stop == ["END"]
    assert chat(top_k=-1).sampling.top_k == 0
    assert chat(max_completion_tokens=5).sampling.max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).sampling.max_tokens == 5
    assert chat(n=1, stream=True, stream_options={"include_obfuscation": False}) == chat()


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        # As the official client sends back a message that it received:
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "assistant", "content": "d", "tool_calls": [], "annotations": []},
    ]
    assert chat(messages=messages).messages == [
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "ab"),
        ChatMessage("assistant", "c"),
        ChatMessage("assistant", "d"),
    ]


def test_logprobs() -> None:
    assert chat(logprobs=False).sampling.logprobs is None
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).sampling.logprobs == 20
    assert completion(logprobs=0).sampling.logprobs == 0
    assert completion(logprobs=5).sampling.logprobs == 5


def test_response_format() -> None:
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    wanted = {"name": "size", "schema": schema, "strict": True, "description": "A size."}
    got = chat(response_format={"type": "json_schema", "json_schema": wanted}).sampling
    assert got.json_schema is not None
    assert json.loads(got.json_schema) == schema
    assert "größe" in got.json_schema, "escapes would make it several times as long"
    json_object = chat(response_format={"type": "json_object"}).sampling
    assert json_object.json_schema == '{"type":"object"}'
    assert chat(response_format={"type": "text"}).sampling.json_schema is None
    for absent in ({}, {"schema": None}):
        any_object = {"type": "json_schema", "json_schema": {"name": "any", **absent}}
        assert chat(response_format=any_object).sampling.json_schema == '{"type":"object"}'
    anything = {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}
    assert chat(response_format=anything).sampling.json_schema == "{}"


@pytest.mark.parametrize("prompt", ["Once", ["Once"]])
def test_one_text_prompt(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == "Once"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_one_prompt_of_token_ids(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == [1, 2]


def test_what_the_log_and_the_answer_need() -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "user": "alice"}
    nvext = {"extra_fields": ["worker_id", "timing"]}
    body = {"model": "m", "messages": [USER], **options, "nvext": nvext}
    request = parse_chat(json.dumps(body).encode())
    assert (request.stream, request.user, request.include_usage()) == (True, "alice", True)
    assert request.extra_fields() == {"worker_id", "timing"}


def test_top_p_of_zero_is_the_most_likely_token() -> None:
    """Legal at OpenAI's; an engine sees it as greedy, whatever the temperature."""
    greedy = SamplingParams(temperature=0.0, top_p=1.0)
    assert chat(top_p=0).sampling == chat(top_p=0, temperature=1.5).sampling == greedy


@pytest.mark.parametrize("name", [*ChatParams.__annotations__, "no_such_parameter"])
def test_openais_chat_parameters_are_all_known(name: str) -> None:
    """A parameter that a new client version adds must become a field or be put on the list."""
    info = chat_refusal(**{name: {"x": 1}})  # wrong for every one of them
    unknown = info.message.startswith(f"'{name}': The parameter is unknown.")
    assert unknown == (name == "no_such_parameter")
    assert str(info.param).startswith(name)


@pytest.mark.parametrize("name", [*CompletionParams.__annotations__, "no_such_parameter"])
def test_openais_completion_parameters_are_all_known(name: str) -> None:
    info = completion_refusal(**{name: {"x": 1}})
    unknown = info.message.startswith(f"'{name}': The parameter is unknown.")
    assert unknown == (name == "no_such_parameter")
    assert str(info.param).startswith(name)


NO_OPS = [(name, value) for name, values in PARAMETERS.items() for value in (*values, None)]


@pytest.mark.parametrize(("name", "value"), NO_OPS)
def test_a_value_that_asks_for_nothing_changes_nothing(name: str, value: Any) -> None:
    """Frameworks send `store: false` or `tools: []` with every request."""
    assert chat(**{name: value}) == chat()
    assert completion(**{name: value}) == completion()


def test_the_values_that_ask_for_nothing() -> None:
    accepted = {
        *("store: false", "metadata: {}", 'service_tier: "auto"', 'service_tier: "default"'),
        *('modalities: ["text"]', "tools: []", 'tool_choice: "none"', 'tool_choice: "auto"'),
        *("parallel_tool_calls: true", "parallel_tool_calls: false", "functions: []"),
        *('function_call: "none"', 'function_call: "auto"'),
        *("echo: false", "best_of: 1", 'suffix: ""'),
    }
    assert accepted == {f"{n}: {json.dumps(value)}" for n, value in NO_OPS if value is not None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("store", True), ("store", 0), ("best_of", 2), ("best_of", True), ("best_of", 1.0)],
        *[("echo", True), ("suffix", "x"), ("metadata", {"a": "b"}), ("metadata", [])],
        *[("service_tier", "flex"), ("modalities", ["text", "audio"]), ("modalities", [])],
        *[("tools", [{"type": "function"}]), ("tool_choice", "required"), ("functions", [{}])],
    ],
)
def test_a_value_that_asks_for_something_is_refused(name: str, value: Any) -> None:
    for info in (chat_refusal(**{name: value}), completion_refusal(**{name: value})):
        assert info.param == name
        accepted = ", ".join(json.dumps(no_op) for no_op in (None, *PARAMETERS[name]))
        assert f"not supported by this server. Accepted without effect: {accepted}." in info.message


@pytest.mark.parametrize("name", sorted({*PARAMETERS, "no_such_parameter"}))
@pytest.mark.parametrize("value", [7, ["x"], {"x": 1}, "x"])
def test_refused_by_name(name: str, value: Any) -> None:
    kind = "not supported by this server" if name in PARAMETERS else "unknown"
    for info in (chat_refusal(**{name: value}), completion_refusal(**{name: value})):
        assert info.param == name
        assert info.message.startswith(f"'{name}': The parameter is {kind}. ")
        assert " Supported: model, max_tokens, " in info.message


@pytest.mark.parametrize(
    ("parameters", "param", "accepted"),
    [
        ({"temperature": 2.1}, "temperature", "0 (greedy) to 2"),
        ({"temperature": -0.1}, "temperature", "0 (greedy) to 2"),
        ({"temperature": "1"}, "temperature", "a number"),
        ({"temperature": True}, "temperature", "a number"),
        ({"temperature": float("nan")}, "temperature", "a number"),
        ({"top_p": -0.01}, "top_p", "from 0 (the most likely token) to 1"),
        ({"top_p": 1.01}, "top_p", "from 0 (the most likely token) to 1"),
        ({"top_k": -2}, "top_k", "0 or -1"),
        ({"min_p": 1.5}, "min_p", "0 (off) to 1"),
        ({"max_tokens": 0}, "max_tokens", "an integer from 1"),
        ({"max_tokens": 1.0}, "max_tokens", "an integer from 1"),
        ({"min_tokens": -1}, "min_tokens", "from 0 to max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to max_tokens"),
        ({"n": 2}, "n", "1: one choice a request"),
        ({"n": True}, "n", "1: one choice a request"),
        ({"n": 1.0}, "n", "1: one choice a request"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop", "up to 4"),
        ({"stop": ""}, "stop[0]", "non-empty string"),
        ({"stop": ["a", ""]}, "stop[1]", "non-empty string"),
        ({"stop": 3}, "stop", "non-empty string"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "token ids"),
        ({"ignore_eos": 1}, "ignore_eos", "true"),
        ({"seed": 2**63}, "seed", "64-bit"),
        ({"seed": 0.5}, "seed", "64-bit"),
        ({"frequency_penalty": 2.01}, "frequency_penalty", "-2 to 2"),
        ({"presence_penalty": -2.01}, "presence_penalty", "-2 to 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "-100 to 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "-100 to 100"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "-100 to 100"),
        ({"logit_bias": {"+5": 1}}, "logit_bias.+5", "plain decimal number"),
        ({"logit_bias": {"5.0": 1}}, "logit_bias.5.0", "plain decimal number"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias.1_0", "plain decimal number"),
        ({"logit_bias": {"05": 1}}, "logit_bias.05", "plain decimal number"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias.\u0665", "plain decimal number"),
        ({"logit_bias": {"2147483648": 1}}, "logit_bias.2147483648", "-100 to 100"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias.99", "plain decimal number"),
        ({"logit_bias": [1]}, "logit_bias", "-100 to 100"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream: true"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "include_usage",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "null, false",
        ),
        ({"user": 7}, "user", "a label"),
        ({"nvext": {"extra_fields": ["cost"]}}, "nvext.extra_fields[0]", '"worker_id", "timing"'),
        ({"nvext": {"greed": True}}, "nvext.greed", "extra_fields"),
        ({"model": ""}, "model", "GET /v1/models"),
        ({"model": None}, "model", "GET /v1/models"),
        ({"model": "m\n2026 INFO forged"}, "model", "GET /v1/models"),
        ({"user": "al\nice"}, "user", "a label"),
        *[({"user": f"al{c}ice"}, "user", "a label") for c in "\x85\x9b\u2028\u2029\x7f\x1b"],
    ],
)
def test_bad_values_are_refused_with_the_accepted_ones(
    parameters: dict[str, Any], param: str, accepted: str
) -> None:
    for info in (chat_refusal(**parameters), completion_refusal(**parameters)):
        assert info.param is not None
        assert info.param.startswith(param)
        assert param in info.message
        assert accepted in info.message


@pytest.mark.parametrize(
    ("parameters", "param", "accepted"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "from 1"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"top_logprobs": 1}, "top_logprobs", "with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format.json_schema",
            "Only with type 'json_schema'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "name",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"minimum": float("inf")}},
                }
            },
            "response_format.json_schema.schema",
            "no JSON numbers",
        ),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "a list of messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "developer"),
        ({"messages": [{**USER, "name": "Al"}]}, "messages[0].name", "role, content"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "messages[0].content",
            "a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "Only text parts are supported, not 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0]",
            "'text' (a string)",
        ),
    ],
)
def test_bad_chat_values(parameters: dict[str, Any], param: str, accepted: str) -> None:
    info = chat_refusal(**parameters)
    assert info.param == param
    assert accepted in info.message


@pytest.mark.parametrize(
    ("parameters", "param", "accepted"),
    [
        ({"prompt": ["a", "b"]}, "prompt", "One prompt a request is supported, not 2"),
        ({"prompt": [[1], [2]]}, "prompt", "One prompt a request is supported, not 2"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [1, -1]}, "prompt[1]", "A token id is an integer"),
        ({"prompt": [True]}, "prompt[0]", "A token id is an integer"),
        ({"prompt": {"a": 1}}, "prompt", "a string or a list of token ids"),
        ({"prompt": None}, "prompt", "a string or a list of token ids"),
        ({"logprobs": 6}, "logprobs", "0 to 5"),
        ({"logprobs": True}, "logprobs", "0 to 5"),
    ],
)
def test_bad_completion_values(parameters: dict[str, Any], param: str, accepted: str) -> None:
    info = completion_refusal(**parameters)
    assert info.param == param
    assert accepted in info.message


def test_missing_parameters() -> None:
    assert refusal(parse_chat, b'{"messages":[]}').param == "model"
    info = refusal(parse_completion, b'{"model":"m"}')
    assert (info.param, info.message) == ("prompt", "Missing required parameter 'prompt'.")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a":"\\ud800"}', b"[" * 100_000])
def test_invalid_json(body: bytes) -> None:
    info = refusal(parse_chat, body)
    assert info.message.startswith("The body is not valid JSON: ")


@pytest.mark.parametrize("body", [b"[]", b"null", b'"model"', b"1"])
def test_not_an_object(body: bytes) -> None:
    assert refusal(parse_chat, body).message == "The body must be a JSON object."


def test_long_input_is_not_echoed_in_full() -> None:
    info = chat_refusal(temperature="x" * 10_000, **{"y" * 10_000: 1})
    assert len(info.message) < 1000
    assert len(chat_refusal(**{"y" * 10_000: 1}).message) < 1000


def test_message_is_one_line_whatever_the_input() -> None:
    """Messages go to the log, where a client must not be able to forge a line."""
    info = chat_refusal(**{"a\n2026 INFO forged\x1b[2J": 1})
    assert info.message.isprintable()
    assert chat_refusal(temperature="a\nb").message.isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
names = sorted(
    {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *PARAMETERS, "x"}
)
bodies = st.dictionaries(st.sampled_from(names), json_values) | json_values


@settings(deadline=None)
@given(bodies, st.booleans())
def test_arbitrary_json_is_parsed_or_refused(body: Any, complete: bool) -> None:
    """Nothing but the one error type leaves the parser, and what it accepts can be sent on."""
    if complete and isinstance(body, dict):
        body = {"model": "m", "messages": [USER], "prompt": "p", **body}
    for parse, other in ((parse_chat, "prompt"), (parse_completion, "messages")):
        own = {k: v for k, v in body.items() if k != other} if isinstance(body, dict) else body
        try:
            outcome = to_wire(to_process_request(parse(json.dumps(own).encode())))
        except PipelineError as error:
            outcome = to_wire(error.info)
        assert msgspec.msgpack.encode(outcome)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused(body: bytes) -> None:
    assert refusal(parse_chat, body).message


@pytest.mark.parametrize("name", MESSAGE_MEMBERS)
def test_members_of_messages_are_refused_by_name(name: str) -> None:
    info = chat_refusal(messages=[{**USER, name: "x"}])
    assert info.param == f"messages[0].{name}"
    assert "not supported by this server" in info.message


def test_openapi_schema_says_what_is_accepted() -> None:
    docs = request_body_docs(ChatCompletionRequest)["requestBody"]
    schema = docs["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(schema), "references would point outside the body's schema"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "messages"]
    described = [name for name, value in schema["properties"].items() if value.get("description")]
    no_ops = [name for name, values in PARAMETERS.items() if values]
    assert described == [*ChatCompletionRequest.model_fields, *no_ops]
    assert schema["properties"]["service_tier"]["enum"] == ["auto", "default", None]
    roles = schema["properties"]["messages"]["items"]["properties"]["role"]["enum"]
    assert roles == ["system", "developer", "user", "assistant"]
