"""How fast a queue gets shorter, for Retry-After."""

from collections import deque

MEASURED_REQUESTS = 32
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


class DrainRate:
    """Measured over the last requests that left; times as of any clock that only goes forward."""

    def __init__(self) -> None:
        self._left: deque[float] = deque(maxlen=MEASURED_REQUESTS)

    def add(self, now: float) -> None:
        """A request left the queue."""
        self._left.append(now)

    def retry_after_s(self, depth: int, now: float) -> float:
        """When a queue of `depth` will be empty; between 1 and 60 s, a guess if none ever left."""
        if not self._left:
            return MIN_RETRY_S
        per_request = (now - self._left[0]) / len(self._left)
        return min(max(depth * per_request, MIN_RETRY_S), MAX_RETRY_S)
