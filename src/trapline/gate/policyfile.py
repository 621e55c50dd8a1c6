"""Reads the policy of a gate."""

from pathlib import Path
from typing import NamedTuple

from trapline.base import decode, files
from trapline.base.errors import BadInputFileError
from trapline.results.gate import POLICY_SCHEMA, GatePolicy

_MOST = 1 << 20  # bytes


class Policy(NamedTuple):
    """A policy, and where it is: the paths in it are relative to that."""

    path: Path
    said: GatePolicy

    def beside(self, name: str | None) -> Path | None:
        """Resolve a path of the policy."""
        return None if name is None else self.path.parent / name


def load(path: Path) -> Policy:
    """Read a policy. Raises BadInputFileError: one sentence."""
    document = decode.toml(files.read(path, limit=_MOST, what="a policy"), str(path))
    if document.get("schema") != POLICY_SCHEMA:
        raise BadInputFileError(
            f'{path}: is no policy of a gate; one starts with schema = "{POLICY_SCHEMA}".'
        )
    return Policy(path, decode.convert(document, GatePolicy, str(path)))
