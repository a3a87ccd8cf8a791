import argparse
from collections.abc import Sequence

from common.errors import ComponentError
from common.kv_arguments import add_kv_arguments, kv_host

import pytest


def parse(arguments: Sequence[str] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_kv_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("KV_HOST", "KV_EVENTS_PORT", "METRICS_PORT"):
        monkeypatch.delenv(variable, raising=False)


def test_nothing_given_leaves_host_and_ports_open() -> None:
    assert vars(parse()) == {"kv_host": None, "kv_events_port": None, "metrics_port": None}


def test_flags_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_HOST", "10.0.0.1")
    monkeypatch.setenv("KV_EVENTS_PORT", "6001")
    monkeypatch.setenv("METRICS_PORT", "6002")
    assert vars(parse(["--kv-events-port", "0"])) == {
        "kv_host": "10.0.0.1",
        "kv_events_port": 0,
        "metrics_port": 6002,
    }
    assert parse(["--kv-host", "::1", "--metrics-port", "65535"]).kv_host == "::1"


@pytest.mark.parametrize("flag", ["--kv-events-port", "--metrics-port"])
@pytest.mark.parametrize("value", ["x", "-1", "65536", ""])
def test_a_port_that_is_none_is_refused_by_name(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([f"{flag}={value}"])
    message = capsys.readouterr().err
    assert f"argument {flag}: {value!r} is not a port from 0 to 65535" in message


def test_a_wrong_port_in_the_environment_is_refused_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METRICS_PORT", "tcp://10.0.0.7:80")
    with pytest.raises(SystemExit):
        parse()
    assert "--metrics-port: 'tcp://10.0.0.7:80' is not a port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nats", "host"),
    [
        ("nats://127.0.0.1:4222", "127.0.0.1"),
        ("nats://127.0.0.5:4222", "127.0.0.1"),  # the same interface; nothing need listen there
    ],
)
def test_the_host_is_the_one_that_reaches_nats(
    monkeypatch: pytest.MonkeyPatch, nats: str, host: str
) -> None:
    monkeypatch.setenv("NATS_SERVER", nats)
    assert kv_host() == host


def test_an_address_of_nats_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", "127.0.0.1")
    with pytest.raises(ComponentError, match="NATS_SERVER"):
        kv_host()
