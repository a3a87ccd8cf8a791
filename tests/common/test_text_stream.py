"""The engine's items as an answer: text, counts and log probabilities agree, whatever the items."""

from itertools import pairwise

from common.model_files import DEFAULT_MODEL
from common.protocol import EngineOutput, ErrorInfo, PipelineError, TextOutput, TokenLogprobs
from common.text import load_text_model
from common.text_stream import TextStream

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ANSWER = "The capital of France is Paris."
MODEL = load_text_model(DEFAULT_MODEL)


def answer(
    ids: list[int], cuts: list[int], stop: list[str], *, min_tokens: int = 0
) -> list[TextOutput]:
    """What comes of the tokens, in items that end at `cuts`; ends where the answer does."""
    stream = TextStream(MODEL, stop, min_tokens=min_tokens, prompt_tokens=3, started=0.0)
    outputs = []
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for number, (start, end) in enumerate(pairwise(edges)):
        item = EngineOutput(
            ids[start:end],
            logprobs=[TokenLogprobs(-1.0) for _ in ids[start:end]],
            worker_id=7 if number == 0 else None,
            cached_tokens=2 if number == 0 else None,
            finish_reason="length" if number == len(edges) - 2 else None,
        )
        outputs.append(stream.push(item))
        if outputs[-1].finish_reason is not None:
            break
    return outputs


def text_of(outputs: list[TextOutput]) -> str:
    return "".join(output.text for output in outputs)


def tokens_of(outputs: list[TextOutput]) -> list[str]:
    return [p.chosen.token for output in outputs for p in output.logprobs or []]


def expected(ids: list[int], stop: list[str], min_tokens: int) -> tuple[str, int, bool]:
    """By definition: the text before the first stop string that ends after `min_tokens` tokens."""
    detokenizer = MODEL.detokenizer()
    text = ""
    for used, token_id in enumerate(ids, 1):
        for character in detokenizer.push([token_id]):
            text += character
            endings = [s for s in stop if text.endswith(s)]
            if endings and used > min_tokens:
                return text[: -max(map(len, endings))], used, True
    return text, len(ids), False


letters = st.text(alphabet="ab é", min_size=1, max_size=30)
cuts = st.lists(st.integers(0, 30), max_size=6)
stops = st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), min_size=0, max_size=3)


@settings(deadline=None, max_examples=300)
@given(letters, cuts, stops, st.integers(0, 5))
def test_equals_the_definition_for_any_items(
    text: str, cuts: list[int], stop: list[str], min_tokens: int
) -> None:
    ids = MODEL.encode(text)
    shown, used, hit = expected(ids, stop, min_tokens)
    outputs = answer(ids, cuts, stop, min_tokens=min_tokens)
    assert text_of(outputs) == shown
    assert outputs[-1].finish_reason == ("stop" if hit else "length")
    usage = outputs[-1].usage
    assert usage is not None
    assert usage.completion_tokens == used == sum(output.tokens for output in outputs)
    assert (usage.prompt_tokens, usage.cached_tokens, outputs[-1].worker_id) == (3, 2, 7)


@settings(deadline=None)
@given(letters, cuts, stops)
def test_log_probabilities_show_no_more_than_the_text(
    text: str, cuts: list[int], stop: list[str]
) -> None:
    ids = MODEL.encode(text)
    outputs = answer(ids, cuts, stop)
    known = ""
    for number in range(len(outputs)):
        known = text_of(outputs[: number + 1])
        assert known.startswith("".join(tokens_of(outputs[: number + 1])).rstrip("�"))
    if outputs[-1].finish_reason == "length":
        assert len(tokens_of(outputs)) == len(ids)


def test_a_stop_string_does_not_show_in_the_log_probabilities() -> None:
    ids = MODEL.encode(ANSWER)
    outputs = answer(ids, list(range(len(ids))), [" of France"])
    assert text_of(outputs) == "The capital"
    assert tokens_of(outputs) == ["The", " capital"]


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, ""), (1, ""), (2, ANSWER)])
def test_a_stop_string_across_the_end_of_min_tokens(min_tokens: int, shown: str) -> None:
    """It counts where it ends."""
    ids = MODEL.encode(ANSWER)
    assert text_of(answer(ids, [1, 2, 3], ["The capital"], min_tokens=min_tokens)) == shown


def test_text_that_was_held_back_comes_with_the_end() -> None:
    ids = MODEL.encode(ANSWER)
    outputs = answer(ids, [2, 4], ["Paris. It"])
    assert text_of(outputs) == ANSWER
    assert tokens_of(outputs) == [MODEL.detokenizer().push([token_id]) for token_id in ids]


def test_the_engines_error_is_raised() -> None:
    stream = TextStream(MODEL, [], min_tokens=0, prompt_tokens=1, started=0.0)
    with pytest.raises(PipelineError) as raised:
        stream.push(EngineOutput(error=ErrorInfo("overloaded", "the queue is full")))
    assert raised.value.info.kind == "overloaded"
