"""What `--kv-transfer` and `--kv-host` accept."""

import argparse
import sys
from typing import Any

from common.errors import ComponentError
from common.kv_transfer.start import add_kv_transfer_arguments, kv_transfer
from tests.common.kv_transfer.kv_helpers import HOST

import pytest


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_kv_transfer_arguments(parser)
    return parser.parse_args(arguments)


def test_the_way_is_chosen_by_flag_or_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KV_TRANSFER", raising=False)
    assert parse().kv_transfer == "zmq"
    monkeypatch.setenv("KV_TRANSFER", "nixl")
    assert parse().kv_transfer == "nixl"
    assert parse("--kv-transfer", "zmq").kv_transfer == "zmq"
    monkeypatch.setenv("KV_TRANSFER", "carrier pigeon")
    with pytest.raises(SystemExit):
        parse()
    assert "'carrier pigeon' is not one of nixl, zmq" in capsys.readouterr().err


async def test_without_nixl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ComponentError, match=r"needs NIXL .*dynamo-pipelines\[nixl\].*zmq"):
        async with kv_transfer("nixl", HOST):
            pass


@pytest.mark.parametrize("way", ["zmq", "nixl"])
@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "Cannot assign requested address"),
        ("0.0.0.0", "name one address"),  # noqa: S104 (refused)
        ("::", "name one address"),
        ("", "cannot lend KV"),
    ],
)
async def test_an_address_that_others_cannot_reach_is_an_error(
    way: Any, host: str, reason: str
) -> None:
    with pytest.raises(ComponentError, match=reason):
        async with kv_transfer(way, host):
            pass
