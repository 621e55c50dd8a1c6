"""How often the kernel itself has instructions of a form, from a scan."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from trapline.results.scan import ScanResult
from trapline.verify import features
from trapline.verify.inputs import decode
from trapline.verify.testpages import END


class _Kind(NamedTuple):
    """Sites that are the same to a cause."""

    trap: str
    form: int
    features: frozenset[str]


class Occurrences:
    """Counts the sites of a scan by form."""

    def __init__(self, scan: ScanResult) -> None:
        self._kinds: dict[_Kind, int] = defaultdict(int)
        known: dict[tuple[str, str], _Kind] = {}
        for site in scan.sites:
            if site.form != "instruction" or not site.bytes:
                continue
            key = (site.trap, site.bytes)
            if key not in known:
                code = bytes.fromhex(site.bytes)
                form = decode(code, END, strict=False).code
                known[key] = _Kind(site.trap, form, features.of_code(code))
            self._kinds[known[key]] += 1
        self.source = (
            f"{scan.kernel.release or 'kernel'}, {scan.kernel.modules} modules, "
            f"{sum(self._kinds.values()):,} instructions"
        )

    def count(self, trap: str, forms: Iterable[int], words: Iterable[str]) -> int:
        """Count sites of a class that have one of the forms and all features that code can have.

        Values, and what else an instruction does not show, are not looked for.
        """
        wanted = frozenset(forms)
        needed = frozenset(words) & features.CODE
        return sum(
            count
            for kind, count in self._kinds.items()
            if kind.trap == trap and kind.form in wanted and needed <= kind.features
        )
