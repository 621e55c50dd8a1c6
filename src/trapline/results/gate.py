"""What a gate asks of a kernel, and the result document of `trapline gate`: "trapline/gate".

schema = "trapline/gate-policy"
version = 1
allow = "devices.toml"
labels = "labels.toml"
baseline = "baseline.toml"

[fail]
new-places = true
classes = ["mmio", "pio"]
refused = true
drivers = true
incomplete = true

[boot]
forbid = ["mmio"]
"""

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from trapline.results.document import Document, ResultDocument
from trapline.results.labels import Labelled
from trapline.results.trapclass import TRAP_CLASSES, PolicyClass, TrapClass

POLICY_SCHEMA: Final = "trapline/gate-policy"
BASELINE_SCHEMA: Final = "trapline/gate-baseline"
SCHEMA: Final = "trapline/gate"
VERSION: Final = 1

_Path = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class FailOn(Document, frozen=True, kw_only=True, rename="kebab"):
    """What of a scan fails. What the baseline has already, or a label settles, does not.

    `new_places`: a function touches the host at more places than in the baseline, by an access of
    one of `classes`. `refused`: a form that the #VE handler cannot emulate. `drivers`: a built-in
    driver off the allow list touches the host. `incomplete`: a part of the kernel was not seen.
    """

    new_places: bool = True
    classes: tuple[TrapClass, ...] = TRAP_CLASSES
    refused: bool = True
    drivers: bool = True
    incomplete: bool = True


class BootPolicy(Document, frozen=True, kw_only=True):
    """A boot that must come to its end, with no access of the classes that are forbidden."""

    forbid: tuple[PolicyClass, ...] = ()


class ContextsPolicy(Document, frozen=True, kw_only=True):
    """`trapline contexts` must find nothing in the kernel's gaps."""

    gaps: bool = True


class GatePolicy(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """A whole file. Paths are relative to it; a table that is not there asks nothing."""

    schema_: Literal["trapline/gate-policy"]
    version: Literal[1]
    allow: _Path | None = None
    labels: _Path | None = None
    baseline: _Path | None = None
    fail: FailOn = FailOn()
    boot: BootPolicy | None = None
    contexts: ContextsPolicy | None = None


class GateBaseline(Document, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What a kernel had already.

    `places` maps each object to what its functions have: "HASH:COUNT" for each function and kind of
    access, where COUNT is the number of places in the source. `findings` are their ids.
    """

    schema_: Literal["trapline/gate-baseline"]
    version: Literal[1]
    kernel: str
    findings: tuple[str, ...]
    places: dict[str, str]


class GateItem(Document, frozen=True, kw_only=True):
    """One thing that fails a check; `label` is one that does not settle it."""

    id: str
    text: str
    driver: str | None
    label: Labelled | None


class GateCheck(Document, frozen=True, kw_only=True):
    """One thing that was asked; it passed if there are no `items`.

    `known` counts what the baseline had already, `settled` what labels settle.
    """

    name: str
    asks: str
    known: int
    settled: int
    items: tuple[GateItem, ...]


class GateResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """What a gate said of a kernel. `baseline` is the release its baseline was made of."""

    lists: ClassVar = ("checks",)

    schema_: Literal["trapline/gate"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    policy: str
    kernel: str
    release: str | None
    build_id: str | None
    baseline: str | None
    checks: tuple[GateCheck, ...]


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a policy."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trapline gate policy",
        **msgspec.json.schema(GatePolicy),
    }
