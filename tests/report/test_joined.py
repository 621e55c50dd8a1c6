"""Several results of one kernel on one page."""

import json

import msgspec
import pytest
from test_page import cells, read

from golden_documents import GOLDEN
from trapline.base.errors import BadInputFileError, ExitCode
from trapline.cli.main import run
from trapline.report import joined


def of_one_kernel():
    """A scan, and a boot that executed its first site."""
    scan, boot = GOLDEN["scan"][0](), GOLDEN["boot"][0]()
    kernel = msgspec.structs.replace(boot.kernel, build_id=scan.kernel.build_id)
    ran = msgspec.structs.replace(boot.sites[0], scan_id=scan.sites[0].id, count=41)
    again = msgspec.structs.replace(ran, count=1)
    return scan, msgspec.structs.replace(boot, kernel=kernel, sites=(ran, again))


def parts(documents):
    return json.loads(read(b"".join(joined.render(documents)).decode()).scripts[0])


def test_sites_say_how_often_a_boot_came_by():
    scan, boot = of_one_kernel()
    first, second = parts([boot, scan])
    assert (first["title"], second["title"]) == ("scan", "boot")
    sites = first["lists"][0]
    at = sites["columns"].index("boot")
    said = [row[at] for row in cells(first, sites["rows"])]
    assert said == ["42 traps"] + ["never in a boot"] * (len(scan.sites) - 1)


def test_a_page_of_one_result_has_no_more_columns():
    scan, _ = of_one_kernel()
    (part,) = parts([scan])
    assert part["lists"][0]["columns"] == list(scan.rows()[0])


def test_results_of_two_kernels_are_refused():
    scan, boot = of_one_kernel()
    kernel = msgspec.structs.replace(boot.kernel, build_id="ab" * 20)
    with pytest.raises(BadInputFileError, match="of two kernels: scan of build id"):
        parts([scan, msgspec.structs.replace(boot, kernel=kernel)])


def test_the_command(tmp_path, capsys):
    paths = []
    for number, document in enumerate(of_one_kernel()):
        path = tmp_path / f"{number}.json"
        path.write_bytes(msgspec.json.encode(document))
        paths.append(str(path))
    out = tmp_path / "page.html"
    assert run(["page", *paths, "-o", str(out)]) == ExitCode.CLEAN
    assert len(json.loads(read(out.read_text()).scripts[0])) == 2
    assert run(["page", str(out), "-o", str(tmp_path / "no.html")]) == ExitCode.BAD_INPUT_FILE
    assert "is not a JSON result of trapline" in capsys.readouterr().err
    assert not (tmp_path / "no.html").exists()
