"""Wrong arguments, or environment variables in their place, are errors that say what is right."""

import argparse

from common.http_arguments import add_http_arguments

import pytest


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_http_arguments(parser)
    return parser.parse_args(arguments)


def test_environment_variables_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "0")
    monkeypatch.setenv("BODY_TIMEOUT", "2.5")
    args = parsed("--max-in-flight=1")
    assert (args.port, args.body_timeout, args.max_in_flight) == (0, 2.5, 1)
    assert parsed("--port=65535").port == 65535


def test_names_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed().allowed_host == []
    assert parsed("--allowed-host=a", "--allowed-host", "b").allowed_host == ["a", "b"]
    monkeypatch.setenv("ALLOWED_HOSTS", "c,d")
    assert parsed().allowed_host == ["c", "d"]


@pytest.mark.parametrize(
    ("flag", "variable", "value", "message"),
    [
        ("--port", "PORT", "99999", "not a port from 0 to 65535"),
        ("--port", "PORT", "abc", "not a port from 0 to 65535"),
        ("--port", "PORT", "-1", "not a port from 0 to 65535"),
        ("--max-in-flight", "MAX_IN_FLIGHT", "0", "not an integer of at least 1"),
        ("--max-in-flight", "MAX_IN_FLIGHT", "1.5", "not an integer of at least 1"),
        ("--max-body-bytes", "MAX_BODY_BYTES", "-5", "not an integer of at least 1"),
        ("--body-timeout", "BODY_TIMEOUT", "0", "not a number of seconds above 0"),
        ("--body-timeout", "BODY_TIMEOUT", "nan", "not a number of seconds above 0"),
        ("--body-timeout", "BODY_TIMEOUT", "inf", "not a number of seconds above 0"),
        ("--body-timeout", "BODY_TIMEOUT", "soon", "not a number of seconds above 0"),
    ],
)
@pytest.mark.parametrize("from_environment", [False, True])
def test_wrong_values(
    flag: str,
    variable: str,
    value: str,
    message: str,
    from_environment: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [] if from_environment else [f"{flag}={value}"]
    if from_environment:
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert f"argument {flag}: {value!r} is {message}" in capsys.readouterr().err
