"""Check numbers against their limits."""


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse a setting that is out of range.

    Raises:
        ValueError: naming the setting, its value and the limits.
    """
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value}; it must be {limits}")
