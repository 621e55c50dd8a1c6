"""The result document of `trapline filter live`: schema "trapline/filter-live"."""

from typing import ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument

SCHEMA: Final = "trapline/filter-live"
VERSION: Final = 1

#: "ok", "finding" (against the list, or a way to the host that a TD should not have), "note".
Standing = Literal["ok", "finding", "note"]


class LiveDevice(Document, frozen=True, kw_only=True):
    """A device of the machine. `allowed` is the id that lets it in, None if none does."""

    bus: str
    name: str
    modalias: str
    driver: str | None
    allowed: str | None


class LiveCheck(Document, frozen=True, kw_only=True):
    """One question about the machine; `why` says what the standing follows from."""

    name: str
    found: str
    standing: Standing
    why: str


class LiveResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What a running machine is, and which of its devices an allow list does not let in."""

    lists: ClassVar = ("checks", "devices")

    schema_: Literal["trapline/filter-live"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    title: str
    is_td: bool
    checks: tuple[LiveCheck, ...]
    devices: tuple[LiveDevice, ...]
