"""Looking up traps in a scan: it has to be one of the same kernel."""

import pytest

from scan_documents import document, kernel
from trapline.model.errors import BadInputFileError
from trapline.td.accounting import require_same_kernel


def test_a_scan_of_another_build_is_refused():
    scan = document(kernel=kernel(build_id="00ff", release="6.12-rt"))
    require_same_kernel(scan, "00ff", "scan.json")
    with pytest.raises(BadInputFileError, match=r"scan\.json: is a scan of 6\.12-rt.*ee11"):
        require_same_kernel(scan, "ee11", "scan.json")


@pytest.mark.parametrize(("theirs", "ours"), [(None, "00ff"), ("00ff", None), (None, None)])
def test_builds_without_an_id_cannot_be_told_apart(theirs, ours):
    require_same_kernel(document(kernel=kernel(build_id=theirs)), ours, "scan.json")
