"""Ports for servers, and how workers of pytest-xdist share them."""

import os
from pathlib import Path

from launch import ports
from launch.errors import LaunchError
from tests.conftest import LONG_FILES, ports_of_worker

import pytest


@pytest.fixture(autouse=True)
def _range_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_ports", ports._ports.__wrapped__)


def test_free_ports_are_of_the_range_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREE_PORTS", "40001-40001")
    monkeypatch.setattr(ports, "is_free", lambda port: True)
    assert ports.free_port() == 40001


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda port: False)
    with pytest.raises(LaunchError, match="no port is free"):
        ports.free_port()


@pytest.mark.parametrize("given", ["", "1", "-5", "0-5", "6-5", "15000-65536", "a-b", "1-2-3"])
def test_what_is_no_range(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREE_PORTS", given)
    with pytest.raises(LaunchError, match=f"FREE_PORTS={given}: not FIRST-LAST, such as"):
        ports.free_port()


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_workers_of_the_tests_have_ports_of_their_own(workers: int) -> None:
    given = [set(ports_of_worker(number, workers)) for number in range(workers)]
    assert len(set().union(*given)) == sum(map(len, given)) > 17000
    assert set().union(*given) <= set(ports.FREE_PORTS)
    assert ports_of_worker(workers, workers) == ports_of_worker(0, workers), "it replaces that one"


def test_this_worker_uses_its_own() -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        assert ports.free_port() in ports.FREE_PORTS
    else:
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        assert ports.free_port() in ports_of_worker(int(worker.removeprefix("gw")), workers)


def test_the_files_that_begin_first_are_there() -> None:
    assert [name for name in LONG_FILES if (Path(__file__).parent / name).is_file()] == [
        *LONG_FILES
    ]
