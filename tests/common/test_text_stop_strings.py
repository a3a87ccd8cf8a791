"""Stop strings against their definition on the whole text."""

from itertools import pairwise

from common.stop_strings import StopStrings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

few_letters = st.text(alphabet="abé", max_size=60)
stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=6), max_size=4)


def naive(text: str, stop: list[str]) -> tuple[str, bool]:
    """The definition: read character by character, end when the text ends with a stop string."""
    for end in range(len(text) + 1):
        endings = [s for s in stop if text[:end].endswith(s)]
        if endings:
            return text[: end - max(map(len, endings))], True
    return text, False


@settings(deadline=None)
@given(few_letters, stops, st.lists(st.integers(0, 60), max_size=20))
def test_equals_the_definition_for_any_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    stopper = StopStrings(stop)
    released, hit = "", False
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    expected, expected_hit = naive(text, stop)
    for start, end in pairwise(edges):
        piece, hit = stopper.push(text[start:end])
        released += piece
        assert expected.startswith(released), "a fragment of a stop string leaked"
        if hit:
            break
    assert (released + stopper.flush(), hit) == (expected, expected_hit)


@settings(deadline=None)
@given(few_letters, stops)
def test_holds_back_no_more_than_could_begin_a_stop_string(text: str, stop: list[str]) -> None:
    expected, hit = naive(text, stop)
    released, _ = StopStrings(stop).push(text)
    beginnings = [s[:size] for s in stop for size in range(len(s)) if text.endswith(s[:size])]
    held = 0 if hit else max(map(len, beginnings), default=0)
    assert released == expected[: len(expected) - held]


def test_across_pieces() -> None:
    stopper = StopStrings(["###", "\nUser:"])
    assert stopper.push("Hello #") == ("Hello ", False)
    assert stopper.push("#") == ("", False)
    assert stopper.push(" no\nUs") == ("## no", False)
    assert stopper.push("er: secret") == ("", True)
    assert stopper.push("more") == ("", True)
    assert stopper.flush() == ""


def test_released_when_the_text_ends_without_a_stop_string() -> None:
    stopper = StopStrings(["END"])
    assert stopper.push("The EN") == ("The ", False)
    assert stopper.flush() == "EN"


def test_without_stop_strings_everything_passes() -> None:
    stopper = StopStrings([])
    assert stopper.push("anything") == ("anything", False)
    assert stopper.flush() == ""


@pytest.mark.timeout(10)
def test_linear_cost_on_the_worst_text() -> None:
    """A quadratic search takes minutes here: each letter undoes a long partial match."""
    stopper = StopStrings(["a" * 3000 + "b"])
    released = "".join(stopper.push("a" * 2999 + "c")[0] for _ in range(100))
    assert released + stopper.flush() == ("a" * 2999 + "c") * 100


@settings(deadline=None)
@given(few_letters, few_letters, stops)
def test_ignored_hits_leave_what_ends_later(ignored: str, text: str, stop: list[str]) -> None:
    stopper = StopStrings(stop)
    released, hit = stopper.push(ignored, ignore_hits=True)
    assert not hit
    piece, hit = stopper.push(text)
    shown = released + piece + stopper.flush()
    for end in range(1, len(text) + 1):
        endings = [s for s in stop if (ignored + text[:end]).endswith(s)]
        if endings:
            assert hit
            assert shown == (ignored + text[:end])[: -max(map(len, endings))]
            return
    assert (shown, hit) == (ignored + text, False)
