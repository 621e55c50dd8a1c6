"""The whole result document as one JSON object on one line."""

from typing import TYPE_CHECKING

from trapline.base import encode

if TYPE_CHECKING:
    from collections.abc import Iterator


def render(result: object) -> "Iterator[bytes]":
    """Yield the document as UTF-8, keys in the order of the schema, then a newline."""
    yield encode.json(result)
    yield b"\n"
