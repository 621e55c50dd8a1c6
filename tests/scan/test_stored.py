"""Scans that are kept: made once, and made again when what was kept is no good."""

import os
from dataclasses import replace

import pytest

import scan_documents
import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.base.errors import BadInputFileError
from trapline.kernel.find.kernelfiles import ModuleFile
from trapline.kernel.find.locate import locate
from trapline.scan import stored
from trapline.scan.stored import require_same_kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return locate(str(tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "trapline" / "scans"


@pytest.fixture
def scans(monkeypatch):
    """Count the scans that are really made."""
    made = []
    real = stored.scan

    def counted(*arguments, **options):
        made.append(arguments)
        return real(*arguments, **{**options, "workers": 1})

    monkeypatch.setattr(stored, "scan", counted)
    return made


def once(kernel, build_id="00ff", modules=()):
    return stored.scan_once(kernel, modules, load(None), build_id)


def test_the_second_time_it_comes_from_the_cache(kernel, cache, scans):
    first = once(kernel)
    assert first.sites
    assert len(list(cache.iterdir())) == 1
    assert once(kernel) == first
    assert len(scans) == 1


@pytest.mark.usefixtures("cache")
def test_what_was_missing_then_and_is_there_now_is_scanned_again(kernel, scans):
    once(kernel)
    once(replace(kernel, missing=("No modules of this kernel.",)))
    once(replace(kernel, config={"CONFIG_INTEL_TDX_GUEST": "n"}))
    assert len(scans) == 3


def test_another_build_is_scanned_again(kernel, cache, scans):
    once(kernel)
    once(kernel, "ff00")
    assert len(scans) == 2
    assert len(list(cache.iterdir())) == 2


def test_another_allow_list_is_scanned_again(kernel, cache, scans, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(
        'schema = "trapline/allow-list"\nversion = 1\ntitle = "other"\n'
        '[[allow]]\nid = "8086:100e"\nname = "e1000"\n'
    )
    once(kernel)
    again = stored.scan_once(kernel, (), load(other), "00ff")
    assert [entry.id for entry in again.allow] == ["8086:100e"]
    assert len(scans) == len(list(cache.iterdir())) == 2


def test_what_another_program_found_is_not_used(kernel, cache, scans, monkeypatch):
    once(kernel)
    monkeypatch.setattr(stored, "_program", lambda: "another")
    once(kernel)
    assert len(scans) == len(list(cache.iterdir())) == 2


def test_the_program_is_what_finds_sites(monkeypatch, tmp_path):
    package = tmp_path / "trapline"
    source = package / "scan" / "accessors.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(stored, "__file__", str(source.with_name("stored.py")))

    def program(text):
        source.write_text(text)
        return stored._program.__wrapped__()

    assert program("INLINED = {'readl'}") == program("INLINED = {'readl'}")
    assert program("INLINED = {'readl'}") != program("INLINED = {'readl', 'mmio_config_readl'}")


def test_a_module_is_scanned_again_when_its_debug_file_comes(kernel, cache, scans, tmp_path):
    path = tiny_kernel.build_module(tmp_path / "m", "demo", ["drivers/demo/demo.c"])
    bare = ModuleFile("demo", path, None, "kernel/drivers/demo.ko")
    once(kernel, modules=[bare])
    once(kernel, modules=[ModuleFile("demo", path, path, bare.location)])
    assert len(scans) == len(list(cache.iterdir())) == 2


def test_a_module_that_was_built_anew_is_scanned_again(kernel, cache, scans, tmp_path):
    path = tiny_kernel.build_module(tmp_path / "m", "demo", ["drivers/demo/demo.c"])
    bare = ModuleFile("demo", path, None, "kernel/drivers/demo.ko")
    once(kernel, modules=[bare])
    os.utime(path, ns=(1, 1))
    once(kernel, modules=[bare])
    assert len(scans) == len(list(cache.iterdir())) == 2


def test_without_a_build_id_nothing_is_kept(kernel, cache, scans):
    once(kernel, None)
    once(kernel, None)
    assert len(scans) == 2
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b'{"schema": "trapline/boot"}'])
def test_a_damaged_entry_is_replaced(kernel, cache, scans, damage):
    first = once(kernel)
    (entry,) = cache.iterdir()
    entry.write_bytes(damage)
    assert once(kernel) == first
    assert len(scans) == 2
    assert stored.read_scan(entry) == first


def test_a_cache_that_cannot_be_written_is_no_error(kernel, cache, scans):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert once(kernel).sites
    assert len(scans) == 1


def test_reading_something_else_is_one_sentence(tmp_path):
    path = tmp_path / "scan.json"
    with pytest.raises(BadInputFileError, match="cannot be read: no such file"):
        stored.read_scan(path)
    os.mkfifo(path)
    with pytest.raises(BadInputFileError, match="is not a regular file"):
        stored.read_scan(path)
    path.unlink()
    path.write_bytes(b"\xff")
    with pytest.raises(BadInputFileError, match="is not the result of `trapline scan"):
        stored.read_scan(path)


def test_a_scan_of_the_same_kernel_or_of_one_without_a_build_id_is_taken(tmp_path):
    known = scan_documents.document()
    path = tmp_path / "scan.json"
    require_same_kernel(known, path, known.kernel.build_id)
    require_same_kernel(known, path, None)
    nameless = scan_documents.document(kernel=scan_documents.kernel(build_id=None))
    require_same_kernel(nameless, path, "ab")
    with pytest.raises(
        BadInputFileError, match=r"another kernel, with build id 0123\w+ and not ab"
    ):
        require_same_kernel(known, path, "ab")
