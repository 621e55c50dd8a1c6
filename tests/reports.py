"""A document as its command prints it."""

from trapline.allowlist.entries import AllowList
from trapline.report.records import ALLOW_LIST, record_of


def rendered(document, form="text", verbosity=0) -> bytes:
    record = ALLOW_LIST if isinstance(document, AllowList) else record_of(document)
    return b"".join(record.render(document, form, verbosity))


def text(document, verbosity=0) -> str:
    return rendered(document, "text", verbosity).decode("ascii")
