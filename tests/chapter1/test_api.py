"""The HTTP API of the running pipeline: limits, statuses, headers, metrics, documentation."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from launch.pipeline import Pipeline
from tests.chapter1.helpers import (
    CHAT,
    MODEL,
    chat,
    eventually,
    lines_about,
    nothing_in_flight,
    stream,
)

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

REFUSED = 'dynamo_frontend_requests_total{endpoint="chat/completions",status="429"}'


def check_error(response: httpx.Response, status: int, message: str) -> dict[str, Any]:
    """The response is an error in OpenAI's shape; the error."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert message in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "'messages'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"n": 2}, "n", "one choice a request"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"max_tokens": 0}, "max_tokens", "an integer from 1"),
        ({"max_tokens": 100_000}, "max_tokens", "from 1 to"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"wrong": 1}, "wrong", "unknown"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "999999"),
        ({"stop_token_ids": [999999]}, "stop_token_ids", "999999"),
        ({"response_format": {"type": "json_object"}}, "response_format", "simulated engine"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_refused_parameters_are_named(
    api: httpx.AsyncClient,
    fields: dict[str, Any],
    param: str | None,
    message: str,
    streamed: bool,
) -> None:
    """Whichever component refuses it: status 400, OpenAI's shape, the parameter's own name."""
    response = await api.post(CHAT, json=chat(**fields, stream=streamed))
    error = check_error(response, 400, message)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"model": "x"}'])
async def test_bodies_that_are_no_request(api: httpx.AsyncClient, body: bytes) -> None:
    for path in (CHAT, "/v1/completions"):
        check_error(await api.post(path, content=body), 400, "")


async def test_stream_options_need_a_stream(api: httpx.AsyncClient) -> None:
    response = await api.post(CHAT, json=chat(stream_options={"include_usage": True}))
    assert check_error(response, 400, "'stream': true")["param"] == "stream_options"


async def test_a_prompt_that_does_not_fit(api: httpx.AsyncClient) -> None:
    """Both numbers, under the name that the client knows the prompt by."""
    response = await api.post(CHAT, json=chat("words " * 9000))
    error = check_error(response, 400, "context length is 8192")
    assert error["param"] == "messages"
    response = await api.post("/v1/completions", json={"model": MODEL, "prompt": [1] * 9000})
    assert check_error(response, 400, "the prompt has 9000 tokens")["param"] == "prompt"


async def test_an_unknown_model(api: httpx.AsyncClient) -> None:
    for streamed in (False, True):
        response = await api.post(CHAT, json={**chat(stream=streamed), "model": "gpt-9"})
        error = check_error(response, 404, f"'{MODEL}' does")
        assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 405),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
    ],
)
async def test_paths_and_methods_that_do_not_exist(
    api: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await api.request(method, path)
    check_error(response, status, f"{method} {path}")
    assert response.headers["x-request-id"]
    assert status != 405 or response.headers["allow"]


async def test_a_body_over_the_limit(api: httpx.AsyncClient) -> None:
    """413 for a declared length without reading the body, and for one that turns out too long."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    declared = await api.post(CHAT, content=b"x" * 70_000)
    check_error(declared, 413, "65536 bytes")
    check_error(await api.post(CHAT, content=parts()), 413, "65536 bytes")
    fits = await api.post(CHAT, json=chat("words " * 8000, max_tokens=1))
    assert fits.status_code == 200


async def test_too_many_requests_in_flight(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    """429 with Retry-After, at once, and a free place can be taken again."""
    async with AsyncExitStack() as stack:
        answers = [
            await stack.enter_async_context(stream(api, chat(f"{n}", max_tokens=4000)))
            for n in range(8)
        ]
        for answer in answers:
            await answer.read_text()
        response = await api.post(CHAT, json=chat(max_tokens=1))
        check_error(response, 429, "8 requests are in flight")
        assert int(response.headers["retry-after"]) >= 1
        assert (await api.get("/health")).status_code == 200, "is busy, not ill"

    async def served() -> bool:
        return (await api.post(CHAT, json=chat(max_tokens=1))).status_code == 200

    await eventually(served)


async def test_requests_count_before_their_bodies_have_come(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    """Clients that send their headers first and all their bodies at once are not all let in."""
    body = json.dumps(chat(max_tokens=5)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    address = urlsplit(shared_pipeline.url)
    before = await metric_values(api)
    async with AsyncExitStack() as stack:
        connections = []
        for _ in range(12):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            stack.callback(writer.close)
            writer.write(head)
            connections.append((reader, writer))

        async def refused() -> bool:
            metrics = await metric_values(api)
            return metrics.get(REFUSED, 0) >= before.get(REFUSED, 0) + 4

        await eventually(refused)
        assert (await metric_values(api))["dynamo_frontend_inflight_requests"] == 8
        for _, writer in connections:
            writer.write(body)
        statuses = [(await reader.readline()).split()[1] for reader, _ in connections]
    assert sorted(statuses) == [b"200"] * 8 + [b"429"] * 4


async def test_the_request_id_is_in_every_components_log(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    response = await api.post(CHAT, json=chat(max_tokens=2, user="alice"))
    request_id = response.headers["x-request-id"]
    assert request_id in response.json()["id"]
    for child in shared_pipeline.processes.values():
        await eventually(lambda child=child: lines_about(child, f"[{request_id}]"))  # type: ignore[misc]
    assert "alice" in lines_about(shared_pipeline.processes["frontend"], request_id)[0]


async def test_request_ids_differ(api: httpx.AsyncClient) -> None:
    answers = [await api.post(CHAT, json=chat(max_tokens=1)) for _ in range(2)]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2


async def test_health_says_what_serves(api: httpx.AsyncClient) -> None:
    health = await api.get("/health")
    assert health.status_code == 200
    assert health.json()["engine"]["simulated"] is True
    assert (await api.get("/live")).json() == {"status": "live"}


async def metric_values(api: httpx.AsyncClient) -> dict[str, float]:
    """The samples of /metrics as `name{label="value"}`."""
    response = await api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    values = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            values[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return values


async def test_metrics_after_known_traffic(api: httpx.AsyncClient) -> None:
    before = await metric_values(api)
    prompt = {"model": MODEL, "prompt": list(range(100, 164)), "max_tokens": 5}
    for _ in range(2):
        assert (await api.post("/v1/completions", json=prompt)).status_code == 200
    async with stream(api, chat("metrics", max_tokens=30)) as answer:
        await answer.read_all()
    await api.post(CHAT, json=chat(n=2))
    await api.post(CHAT, json={**chat(), "model": "gpt-9"})
    await nothing_in_flight(api)
    async with stream(api, chat("gone", max_tokens=4000)) as leaving:
        while len(leaving.chunks) < 12:  # most of them after an interval
            await leaving.read_text(len(leaving.text) + 1)
        during = await metric_values(api)
    await nothing_in_flight(api)
    after = await metric_values(api)

    def grew(name: str) -> float:
        key = f"dynamo_frontend_{name}"
        return after[key] - before.get(key, 0)

    assert during["dynamo_frontend_inflight_requests"] == 1
    assert grew('requests_total{endpoint="completions",status="200"}') == 2
    assert grew('requests_total{endpoint="chat/completions",status="200"}') == 1
    assert grew('requests_total{endpoint="chat/completions",status="400"}') == 1
    assert grew('requests_total{endpoint="chat/completions",status="404"}') == 1
    assert grew('requests_total{endpoint="chat/completions",status="499"}') == 1
    assert grew('errors_total{kind="invalid_request"}') == 1
    assert grew('errors_total{kind="model_not_found"}') == 1
    assert grew('errors_total{kind="cancelled"}') == 1
    assert grew("time_to_first_token_seconds_count") == 4
    assert grew("output_sequence_tokens_sum") > 2 * 5 + 30, "those of the cancelled one, too"
    assert grew("output_sequence_tokens_count") == 4
    assert grew("output_tokens_total") == grew("output_sequence_tokens_sum")
    intervals = grew("inter_token_latency_seconds_count")
    assert 10 <= intervals < grew("output_tokens_total")
    assert grew("input_sequence_tokens_count") == 3
    assert grew("input_sequence_tokens_sum") > 128
    assert grew("cached_tokens_sum") >= 48, "the second prompt of 64 tokens was in the cache"


async def test_latencies_are_per_token(api: httpx.AsyncClient) -> None:
    """They add up to the answer's time, of which the engine takes 20 ms a token."""
    before = await metric_values(api)
    began = time.monotonic()
    await api.post(CHAT, json=chat("latency", max_tokens=30))
    took = time.monotonic() - began
    await nothing_in_flight(api)
    after = await metric_values(api)

    def grew(name: str) -> float:
        key = f"dynamo_frontend_{name}"
        return after[key] - before.get(key, 0)

    first, later = "time_to_first_token_seconds", "inter_token_latency_seconds"
    assert grew(f"{first}_count") == 1
    assert 0 < grew(f"{later}_count") < 30
    assert 30 * 0.02 <= grew(f"{first}_sum") + grew(f"{later}_sum") <= took


async def test_documentation(api: httpx.AsyncClient) -> None:
    docs = (await api.get("/docs")).text
    assert "swagger" in docs
    assert not re.findall(r'(?:src|href)="https?:', docs), "it works without the internet"
    paths = (await api.get("/openapi.json")).json()["paths"]
    assert set(paths) == {
        *(CHAT, "/v1/completions", "/v1/models", "/v1/models/{model_id}"),
        *("/health", "/live", "/metrics"),
    }
    body = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model", "stop", "max_completion_tokens"} <= body["properties"].keys()
    assert {"200", "400", "404", "413", "429", "503"} <= paths[CHAT]["post"]["responses"].keys()


async def test_one_model(api: httpx.AsyncClient) -> None:
    found = await api.get(f"/v1/models/{MODEL}")
    assert found.status_code == 200
    assert found.json() == (await api.get("/v1/models")).json()["data"][0]
    for other in ("gpt-9", "org/gpt-9"):
        error = check_error(await api.get(f"/v1/models/{other}"), 404, f"'{other}' does not")
        assert error["code"] == "model_not_found"


async def test_the_page(api: httpx.AsyncClient) -> None:
    page = await api.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<!doctype html>" in page.text.lower()[:100]


async def test_a_client_that_leaves_while_it_sends_the_body(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    """That is no fault of the server: no traceback in the log, and the next one is served."""
    frontend = shared_pipeline.processes["frontend"]
    before = await metric_values(api)
    address = urlsplit(shared_pipeline.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{"
        connection.sendall(head.encode())
    await eventually(lambda: lines_about(frontend, "left before the whole request"))
    assert (await api.post(CHAT, json=chat(max_tokens=1))).status_code == 200
    assert not lines_about(frontend, "Traceback")
    await nothing_in_flight(api)
    after = await metric_values(api)
    counted = 'dynamo_frontend_requests_total{endpoint="chat/completions",status="499"}'
    assert after[counted] == before.get(counted, 0) + 1


async def test_a_page_of_another_site_is_refused(api: httpx.AsyncClient) -> None:
    """Any web page may post to localhost; the chat page, curl and scripts are let through."""
    other = {"origin": "http://evil.example", "content-type": "text/plain"}
    response = await api.post(CHAT, json=chat(max_tokens=1), headers=other)
    check_error(response, 403, "another site")
    own = {"origin": str(api.base_url).rstrip("/")}
    assert (await api.post(CHAT, json=chat(max_tokens=1), headers=own)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics", "/nothing", CHAT])
async def test_a_page_whose_name_resolves_to_us_is_refused(
    api: httpx.AsyncClient, path: str
) -> None:
    """To its browser it is of our own site, so that it could read answers."""
    headers = {"host": "evil.example", "sec-fetch-site": "same-origin"}
    response = await api.request("POST" if path == CHAT else "GET", path, headers=headers)
    check_error(response, 403, "'evil.example' is not known here")


async def test_requests_one_after_another_on_one_connection(shared_pipeline: Pipeline) -> None:
    """A whole answer, a stream, a refusal: each leaves the connection ready for the next."""
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(
        base_url=shared_pipeline.url, limits=limits, timeout=30, trust_env=False
    ) as client:
        ports = set()
        for n in range(3):
            whole = await client.post(CHAT, json=chat(max_tokens=2))
            assert whole.status_code == 200
            ports.add(whole.extensions["network_stream"].get_extra_info("client_addr"))
            async with stream(client, chat(f"{n}", max_tokens=3)) as answer:
                await answer.read_all()
            refused = await client.post(CHAT, json=chat(n=2))
            assert refused.status_code == 400
        assert len(ports) == 1


async def test_a_stream_survives_a_client_that_reads_slowly(api: httpx.AsyncClient) -> None:
    """What the client has not read yet waits for it; nothing is lost or out of order."""
    body = {"model": MODEL, "prompt": "slow", "max_tokens": 40}
    whole = (await api.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    async with stream(api, body, "/v1/completions") as answer:
        await answer.read_text()
        other = await api.post("/v1/completions", json={**body, "max_tokens": 60})
        assert other.status_code == 200
        await answer.read_all()
    assert answer.text == whole


async def test_answers_at_the_same_time_do_not_mix(api: httpx.AsyncClient) -> None:
    async def ask(n: int) -> str:
        body = {"model": MODEL, "prompt": f"prompt {n}", "max_tokens": 12}
        async with stream(api, body, "/v1/completions") as answer:
            await answer.read_all()
        return answer.text

    alone = [await ask(n) for n in range(6)]
    together = await asyncio.gather(*[ask(n) for n in range(6)])
    assert alone == together
    assert len(set(alone)) == 6


async def test_unicode_survives(api: httpx.AsyncClient) -> None:
    text = "Grüße, 世界 🎉 é \u0000 \u2028"
    response = await api.post(CHAT, content=json.dumps(chat(text, max_tokens=1)))
    assert response.status_code == 200
