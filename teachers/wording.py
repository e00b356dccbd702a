"""Wording of messages and tables."""


def number_of(number: int, what: str) -> str:
    """Return a number of things, such as "1,234 held-out windows"; `what` is their plural, which of one loses its s."""
    return f"{number:,} {what.removesuffix('s') if number == 1 else what}"
