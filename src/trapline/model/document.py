"""The base of every result document."""

import msgspec


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of everything that is written out: immutable, and strict when read back."""
