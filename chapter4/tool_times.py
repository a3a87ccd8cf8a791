"""How long tools take: when a step that calls one is expected back."""

FIRST_GUESS_S = 1.0
SHARE_OF_LAST = 0.2


class ToolTimes:
    """A mean in which the last calls count most."""

    def __init__(self) -> None:
        self._mean_s = FIRST_GUESS_S

    def add(self, seconds: float) -> None:
        self._mean_s += (seconds - self._mean_s) * SHARE_OF_LAST

    def expected_s(self) -> float:
        return self._mean_s
