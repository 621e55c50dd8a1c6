"""Kernels whose code and debug information are in two files, as distributions have them."""

import http.server
import lzma
import shutil
import struct
import threading
import time

import pytest

import tiny_kernel
import trapline
from trapline.base.errors import ExitCode
from trapline.cli.main import run
from trapline.kernel.binary import Binary
from trapline.kernel.elf.file import ElfFile

RELEASE = "6.12.0-test"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DEBUGINFOD_URLS", raising=False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A whole vmlinux, its code without debug information, and the reverse."""
    folder = tmp_path_factory.mktemp("kernel")
    whole = with_notes(tiny_kernel.build_vmlinux(folder))
    debug, code = folder / "split.debug", folder / "code"
    tiny_kernel.run(folder, "objcopy", "--only-keep-debug", "vmlinux", debug.name)
    tiny_kernel.run(folder, "strip", "-s", "-o", code.name, "vmlinux")
    linked = folder / "linked"
    tiny_kernel.run(folder, "objcopy", f"--add-gnu-debuglink={debug.name}", code.name, linked.name)
    return whole, code, debug, linked


def with_notes(path):
    """Make .notes what it is in a kernel: with .note.GNU-stack in it ld calls it SHT_PROGBITS."""
    data = bytearray(path.read_bytes())
    with ElfFile.open(path) as elf:
        number = elf.section(".notes").index
    (table,) = struct.unpack_from("<Q", data, 40)
    struct.pack_into("<I", data, table + 64 * number + 4, 7)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def expected(parts):
    return ids(parts[0])


def ids(path):
    result = trapline.scan(path)
    assert not any("no code" in text for text in result.coverage.missing)
    return sorted(site.id for site in result.sites)


def build_id(path):
    with ElfFile.open(path) as elf:
        return elf.build_id


def put(source, target, *, packed=False):
    target.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        target.write_bytes(lzma.compress(source.read_bytes()))
    else:
        shutil.copy(source, target)


def test_the_parts_alone_are_not_whole(parts, expected):
    """Or what follows would show nothing."""
    _, code, debug, _ = parts
    assert ids(code) != expected
    assert "no code" in trapline.scan(debug).coverage.missing[0]
    assert run(["scan", str(debug)]) in {ExitCode.INCOMPLETE, ExitCode.FINDINGS}


def test_suse_s_layout(parts, expected, tmp_path):
    _, code, debug, _ = parts
    root = tmp_path / "root"
    put(code, root / f"boot/vmlinux-{RELEASE}.xz", packed=True)
    put(debug, root / f"usr/lib/debug/boot/vmlinux-{RELEASE}.debug")
    assert ids(root) == expected


def test_a_folder_with_both_files(parts, expected, tmp_path):
    _, code, debug, _ = parts
    put(code, tmp_path / "k/vmlinux")
    put(debug, tmp_path / "k/vmlinux.debug")
    assert ids(tmp_path / "k") == expected


def test_two_kernels_in_a_folder_are_still_refused(parts, tmp_path, capsys):
    _, code, _, _ = parts
    other = with_notes(
        tiny_kernel.build_vmlinux(tmp_path / "other", {"drivers/demo/spill.c": None})
    )
    put(code, tmp_path / "k/vmlinux")
    put(other, tmp_path / "k/vmlinux.other")
    assert run(["scan", str(tmp_path / "k")]) == ExitCode.KERNEL_NOT_FOUND
    assert "several kernels" in capsys.readouterr().err


def test_a_tree_of_build_ids(parts, expected, tmp_path):
    _, code, debug, _ = parts
    name = build_id(code)
    root = tmp_path / "root"
    put(code, root / f"boot/vmlinux-{RELEASE}")
    put(debug, root / f"usr/lib/debug/.build-id/{name[:2]}/{name[2:]}.debug")
    assert ids(root) == expected


@pytest.mark.parametrize("place", ["split.debug", ".debug/split.debug"])
def test_a_debug_link(place, parts, expected, tmp_path):
    _, _, debug, linked = parts
    put(linked, tmp_path / "k/vmlinux")
    put(debug, tmp_path / "k" / place)
    assert ids(tmp_path / "k/vmlinux") == expected


def test_a_debug_link_to_another_build_is_not_followed(parts, tmp_path):
    _, _, _, linked = parts
    other = with_notes(
        tiny_kernel.build_vmlinux(tmp_path / "other", {"drivers/demo/spill.c": None})
    )
    put(linked, tmp_path / "k/vmlinux")
    put(other, tmp_path / "k/split.debug")
    assert "neither debug information" in trapline.scan(tmp_path / "k/vmlinux").coverage.missing[0]


def test_what_is_joined_is_what_was_split(parts, tmp_path):
    whole, code, debug, _ = parts
    put(code, tmp_path / "k/vmlinux")
    put(debug, tmp_path / "k/vmlinux.debug")
    joined = trapline.open_kernel(tmp_path / "k").vmlinux
    with Binary.open_vmlinux(whole) as mine, Binary.open_vmlinux(joined) as theirs:
        assert [(s.name, s.address) for s in theirs.text] == [
            (s.name, s.address) for s in mine.text
        ]
        assert [bytes(s.data) for s in theirs.text] == [bytes(s.data) for s in mine.text]
        loads = [[s for s in b.elf.segments if s.type == 1] for b in (mine, theirs)]
        assert [s.virtual_address for s in loads[0]] == [s.virtual_address for s in loads[1]]


# debuginfod.


class Server:
    """A debuginfod that answers as `behave` says; `asked` are the paths that it was asked for."""

    def __init__(self, behave):
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                behave(self)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def sends(data, status=200, length=None):
    def behave(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)

    return behave


def hangs(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.write(b"\x7fELF")
    handler.wfile.flush()
    time.sleep(5)


def test_debuginfod_is_asked_once(parts, expected, tmp_path, monkeypatch):
    _, code, debug, _ = parts
    put(code, tmp_path / "k/vmlinux")
    with Server(sends(debug.read_bytes())) as server:
        monkeypatch.setenv("DEBUGINFOD_URLS", server.url)
        assert ids(tmp_path / "k/vmlinux") == expected
        assert server.asked == [f"/buildid/{build_id(code)}/debuginfo"]
        assert ids(tmp_path / "k/vmlinux") == expected
        assert len(server.asked) == 1


def test_without_the_variable_nobody_is_asked(parts, tmp_path):
    put(parts[1], tmp_path / "k/vmlinux")
    with Server(sends(b"")) as server:
        trapline.open_kernel(tmp_path / "k/vmlinux")
        assert server.asked == []


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (hangs, "cannot be read"),
        (sends(b"garbage" * 1000), "another file"),
        (sends(b"", 500), "status 500"),
        (sends(b"\x7fELF" * 10, length=10_000_000), "breaks off"),
    ],
)
def test_a_server_that_hangs_or_lies_is_said_and_asked_no_more(
    behave, says, parts, tmp_path, monkeypatch
):
    put(parts[1], tmp_path / "k/vmlinux")
    monkeypatch.setenv("DEBUGINFOD_TIMEOUT", "1")
    with Server(behave) as server:
        monkeypatch.setenv("DEBUGINFOD_URLS", server.url)
        kernel = trapline.open_kernel(tmp_path / "k/vmlinux")
        assert any("not asked any more" in text and says in text for text in kernel.missing)
        assert len(server.asked) == 1
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []


def test_a_server_that_has_another_build_is_not_believed(parts, tmp_path, monkeypatch):
    other = with_notes(
        tiny_kernel.build_vmlinux(tmp_path / "other", {"drivers/demo/spill.c": None})
    )
    put(parts[1], tmp_path / "k/vmlinux")
    with Server(sends(other.read_bytes())) as server:
        monkeypatch.setenv("DEBUGINFOD_URLS", server.url)
        kernel = trapline.open_kernel(tmp_path / "k/vmlinux")
    assert any("another file" in text for text in kernel.missing)


def test_the_next_server_is_asked(parts, expected, tmp_path, monkeypatch):
    _, code, debug, _ = parts
    put(code, tmp_path / "k/vmlinux")
    with Server(sends(b"", 404)) as without, Server(sends(debug.read_bytes())) as having:
        monkeypatch.setenv("DEBUGINFOD_URLS", f"{without.url} ftp://no.such {having.url}/")
        assert ids(tmp_path / "k/vmlinux") == expected
        assert len(without.asked) == len(having.asked) == 1
