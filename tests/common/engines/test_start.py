"""The engine's flags and their environment fallbacks."""

import argparse
from pathlib import Path

from common.engines.simulated import SimulatedEngine
from common.engines.start import add_engine_arguments, parse_engine_arguments, start_engine

import pytest


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine")
    add_engine_arguments(parser)
    return parse_engine_arguments(parser, arguments)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ENGINE_BACKEND", "Simulated", "--backend: 'Simulated' is not one of llamacpp, simulated"),
        ("WORKER_ID", "abc", "--worker-id: invalid int value: 'abc'"),
    ],
)
def test_a_wrong_value_in_the_environment_is_refused_as_a_typed_one(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    message: str,
) -> None:
    """ENGINE_BACKEND=Simulated once ran llama.cpp without a word."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as caught:
        parse()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_typed_backend_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--backend", "magic")
    assert "'magic' is not one of llamacpp, simulated" in capsys.readouterr().err


async def test_the_environment_sets_up_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_BACKEND", "simulated")
    monkeypatch.setenv("WORKER_ID", "3")
    monkeypatch.setenv("ENGINE_ARGS", "block_size=32 zero_delay=true")
    engine = await start_engine(parse("--engine-arg", "max_running=5"))
    assert isinstance(engine, SimulatedEngine)
    settings = engine.settings
    assert (settings.block_size, settings.zero_delay, settings.max_running) == (32, True, 5)
    assert engine.info.worker_id == 3
    await engine.close()


@pytest.mark.parametrize("backend", ["simulated", "llamacpp"])
async def test_a_wrong_setting_is_named(backend: str) -> None:
    with pytest.raises(ValueError, match=r"--engine-arg blocksize: not one of .*block_size"):
        await start_engine(parse("--backend", backend, "--engine-arg", "blocksize=1"))
    with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `\$\.block_size`"):
        await start_engine(parse("--backend", backend, "--engine-arg", "block_size=abc"))


async def test_a_file_that_llama_cpp_cannot_load_is_a_wrong_value_not_a_traceback(
    tmp_path: Path,
) -> None:
    """Components turn a ValueError into one line; `LlamaCppError` is not one."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"cannot load the model .*broken\.gguf") as caught:
        await start_engine(parse("--model", str(broken)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["simulated", "llamacpp"])
async def test_our_own_backends_have_no_flags_after_the_dashes(backend: str) -> None:
    with pytest.raises(ValueError, match=r"'--tp 2' after --: .*--engine-arg NAME=VALUE"):
        await start_engine(parse("--backend", backend, "--", "--tp", "2"))


@pytest.mark.parametrize("backend", ["sglang", "vllm"])
async def test_what_an_external_backend_does_not_take_is_named(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    with pytest.raises(ValueError, match=rf"--engine-arg tp=2: .*--backend {backend} -- --flag"):
        await start_engine(parse("--backend", backend, "--engine-arg", "tp=2"))
    with pytest.raises(ValueError, match=rf"is a GGUF file; {backend} needs .*Hugging Face"):
        await start_engine(parse("--backend", backend))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'pip install "\.\[{backend}\]"'):
        await start_engine(parse("--backend", backend, "--model", "Qwen/Qwen3-0.6B"))


def test_flags_after_the_dashes_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse itself would read `--model` there as ours, and drop a second `--`."""
    monkeypatch.setenv("ENGINE_FLAGS", "--tp 2 --served-model-name 'a b'")
    assert parse().engine_flags == ["--tp", "2", "--served-model-name", "a b"]
    args = parse("--backend", "vllm", "--model", "a/b", "--", "--model", "x", "--", "-q")
    assert (args.model, args.engine_flags) == ("a/b", ["--model", "x", "--", "-q"])
    assert parse("--").engine_flags == []


def test_broken_quotes_in_the_environment_are_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENGINE_FLAGS", "--name 'a b")
    with pytest.raises(SystemExit):
        parse()
    assert "ENGINE_FLAGS: No closing quotation" in capsys.readouterr().err
