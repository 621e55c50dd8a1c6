"""The result document of `trapline verify`: schema "trapline/verify"."""

from typing import ClassVar, Final, Literal

from trapline.results.document import Document, ResultDocument
from trapline.results.labels import Labelled
from trapline.results.trapclass import EmulatedClass

SCHEMA: Final = "trapline/verify"
VERSION: Final = 1

Kind = Literal[
    "not-refused",
    "crash",
    "hang",
    "wrong-exception",
    "wrong-access",
    "wrong-memory",
    "wrong-register",
    "stale-bits",
    "leak-to-host",
    "from-host",
    "wrong-flags",
    "refused",
]
# From worst to least; the order of findings in a report.
SEVERITY: Final[tuple[Kind, ...]] = (
    "crash",
    "hang",
    "not-refused",
    "wrong-memory",
    "wrong-access",
    "wrong-register",
    "stale-bits",
    "from-host",
    "leak-to-host",
    "wrong-exception",
    "refused",
    "wrong-flags",
)


class VerifiedKernel(Document, frozen=True, kw_only=True):
    """What was verified. `name` is what the user called it."""

    name: str
    release: str | None
    build_id: str | None


class Finding(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """One cause of mismatches, with its smallest example.

    `cause` is what the failing cases have in common and no passing case has. `forms` are the
    manual's names of the instruction forms it was seen with. `instruction` and `bytes` are the
    example, `circumstances` what else there was to it; `expected` is what the processor does,
    `got` what the handler did. `cases` counts failing cases of all `tried`: those that have one of
    the forms and that the handler did not refuse as it may. `occurs` counts the sites of the scan
    that have such a form; None without a scan. `id` is made of class, kind and cause: it survives
    a change of the forms, which a baseline tells of.
    """

    id: str
    trap: EmulatedClass
    kind: Kind
    cause: str
    forms: tuple[str, ...]
    instruction: str
    bytes: str
    circumstances: str
    expected: str
    got: str
    cases: int
    tried: int
    occurs: int | None


class Worse(Document, frozen=True, kw_only=True):
    """A finding that an earlier verification did not have, or not as large: `why` says which."""

    id: str
    why: str


class Refused(Document, frozen=True, kw_only=True, rename={"trap": "class"}):
    """A form that the handler refuses, whatever its operands."""

    trap: EmulatedClass
    form: str
    instruction: str
    bytes: str
    cases: int
    occurs: int | None


class VerifyResult(ResultDocument, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """One verification.

    `injected` counts the #VEs that were made by hand, for what the engine cannot execute.
    `cases` is the number of cases, `verdicts` counts them by class and verdict. `digest` is a
    hash over all verdicts: two runs on the same kernel have the same.
    """

    lists: ClassVar = ("findings", "refused")

    schema_: Literal["trapline/verify"] = SCHEMA
    version: Literal[1] = VERSION
    generator: str
    kernel: VerifiedKernel
    module_version: str
    cases: int
    injected: int
    verdicts: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]
    refused: tuple[Refused, ...]
    scanned: str | None
    digest: str
    worse_than_baseline: tuple[Worse, ...] | None = None
    labels: tuple[Labelled, ...] = ()
