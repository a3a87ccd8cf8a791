"""Stop strings in a text that arrives in pieces."""


class StopStrings:
    """Ends a text where the first stop string is complete, and never shows any of it.

    The stop string that ends the text is the one whose last character comes first; of several
    that end there, the longest. The pieces' boundaries make no difference. Text that may be
    the beginning of a stop string is held back until it is certain. The cost is linear in the
    text (Knuth, Morris, Pratt 1977).
    """

    def __init__(self, stop: list[str]) -> None:
        self._stops = [(text, _borders(text)) for text in stop]
        self._matched = [0] * len(stop)  # how much of each stop string the text ends with
        self._held = ""
        self._hit = False

    def push(self, text: str, *, ignore_hits: bool = False) -> tuple[str, bool]:
        """What may be shown of the text so far, and whether a stop string was hit.

        After a hit nothing more is given out. `ignore_hits`: stop strings that end in this
        piece do not count, those that begin in it and end in a later one do.
        """
        if not self._stops:
            return text, False
        if self._hit:
            return "", True
        best: tuple[int, int] | None = None  # end in `text`, minus the stop string's length
        for number, (stop, borders) in enumerate(self._stops):
            end, self._matched[number] = _advance(stop, borders, self._matched[number], text)
            rest = text
            while ignore_hits and end is not None:
                rest = rest[end:]
                matched = borders[len(stop)]
                end, self._matched[number] = _advance(stop, borders, matched, rest)
            if end is not None and (best is None or (end, -len(stop)) < best):
                best = (end, -len(stop))
        known = self._held + text
        if best is not None:
            self._hit, self._held = True, ""
            return known[: len(known) - len(text) + sum(best)], True
        held = max(self._matched)
        released = len(known) - held
        self._held = known[released:]
        return known[:released], False

    def flush(self) -> str:
        """What was held back, once the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _borders(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is its suffix."""
    borders = [0] * (len(text) + 1)
    matched = 0
    for end in range(1, len(text)):
        while matched and text[end] != text[matched]:
            matched = borders[matched]
        matched += text[end] == text[matched]
        borders[end + 1] = matched
    return borders


def _advance(stop: str, borders: list[int], matched: int, text: str) -> tuple[int | None, int]:
    """Where in `text` the stop string is complete, and how much of it `text` ends with."""
    position = 0
    while position < len(text):
        if matched == 0:
            position = text.find(stop[0], position)
            if position < 0:
                return None, 0
        while matched and text[position] != stop[matched]:
            matched = borders[matched]
        matched += text[position] == stop[matched]
        position += 1
        if matched == len(stop):
            return position, 0
    return None, matched
