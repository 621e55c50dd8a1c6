"""Turns of phrase that several pages and formats share."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a count with its noun: "1 site", "1,138 modules"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def injected(events: int) -> str:
    """Say that events were injected; the first line of whatever is written of a campaign."""
    verb = "was" if events == 1 else "were"
    return f"{counted(events, 'event')} {verb} injected by trapline."
