"""Every kind of input that trapline reads: valid ones, and what reads them."""

import os
import shutil
import socket
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from importlib import resources
from pathlib import Path
from random import Random

import msgspec

import elf_images
import golden_documents
import tiny_kernel
from siege.batches import Kind
from siege.mutate import NUMBERS, WORDS, mangled, retyped, reworded, sections
from trapline.allowlist import listfile
from trapline.base.errors import BadImageError, ExitCode
from trapline.base.printable import printable
from trapline.cli.main import run as command_line
from trapline.devicefilter.live import inspect
from trapline.explore import baseline, scenario
from trapline.explore.store import Store
from trapline.kernel.binary import VMLINUX, Binary
from trapline.kernel.drivers import devicetables
from trapline.kernel.elf.bzimage import is_boot_image, unpack_vmlinuz
from trapline.kernel.elf.compression import decompress
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.live.orc import OrcTable
from trapline.kernel.types.btf import Btf
from trapline.machine.gdb.codec import Decoder
from trapline.machine.gdb.codec import encode as gdb_packet
from trapline.machine.loader import initramfs, kernelimage
from trapline.machine.qemu.qtest import Qtest
from trapline.rules import tables
from trapline.rules.lint import lint_folder
from trapline.scan.stored import read_scan
from trapline.verify import baseline as verify_baseline

MIB = 1 << 20
RAM = memoryview(bytearray(80 * MIB))


def all_kinds(folder: Path) -> list[Kind]:
    """Make every kind; `folder` takes what compilers make, and a file at a time."""
    extra = {"init/message.c": 'const char tdx_message[] = "tdx: Guest detected";'}
    vmlinux = _loadable(
        tiny_kernel.build_vmlinux(
            folder / "vmlinux", extra, *_same(folder / "vmlinux")
        ).read_bytes()
    )
    sources = ["drivers/demo/demo.c"]
    module = tiny_kernel.build_module(
        folder / "module", "demo", sources, None, *_same(folder / "module")
    )
    return [
        *_images(vmlinux, module.read_bytes()),
        *_texts(folder),
        *_documents(folder),
        Kind(
            "store", (_store(folder),), _queried, partial(_read_store, folder / "store.sqlite"), 2
        ),
        *_talk(folder),
    ]


def _images(vmlinux: bytes, module: bytes) -> "Iterator[Kind]":
    def spans(image: bytes, *names: str) -> Callable[[Random, bytes], bytes]:
        hot = [span for name in names for span in sections(image, name)]
        return partial(mangled, hot=hot)

    yield Kind("elf", (vmlinux,), spans(vmlinux, ""), _read_vmlinux)
    yield Kind("dwarf", (vmlinux,), spans(vmlinux, ".debug"), _read_vmlinux)
    small = spans(vmlinux, ".alt", ".BTF", ".note", ".symtab")
    yield Kind("kernel tables", (vmlinux,), small, _read_vmlinux)
    yield Kind("code", (vmlinux,), spans(vmlinux, ".text", ".init.text"), _read_vmlinux)
    yield Kind("module", (module,), spans(module, "", ".rela"), _read_module)
    elf = ElfFile.open(vmlinux)
    btf = bytes(elf.contents(".BTF"))
    yield Kind("btf", (btf,), partial(mangled, hot=[(0, 24)]), _read_btf)
    orc = struct.pack("<40i", *range(-400, 0, 10)) + bytes(range(240))
    yield Kind("orc", (orc,), mangled, _read_orc)
    stripped = _stripped(vmlinux)
    packings = tuple(elf_images.packed(stripped).values())
    yield Kind("compressed", packings, partial(mangled, hot=[(0, 64)]), _read_compressed)
    images = tuple(elf_images.boot_image(stripped, packed=each) for each in packings)
    yield Kind("boot image", images, partial(mangled, hot=[(0x1F0, 0x268)]), _read_boot_image)


def _texts(folder: Path) -> "Iterator[Kind]":
    lists = resources.files("trapline.allowlist") / "lists"
    allow = tuple(each.read_bytes() for each in sorted(lists.iterdir(), key=str))
    yield Kind("allow list", allow, reworded, partial(listfile.parse, source="list.toml"))
    shipped = resources.files("trapline.explore") / "scenarios"
    scenarios = tuple((shipped / f"{name}.toml").read_bytes() for name in scenario.shipped())
    yield Kind("scenario", scenarios, reworded, _read_scenario)
    rules = tables.folder_of(tables.DEFAULT_VERSION)
    copy = folder / "rules"
    copy.mkdir()
    for name in tables.TABLES:
        (copy / f"{name}.csv").write_bytes((rules / f"{name}.csv").read_bytes())
    for name in tables.TABLES:
        sound = (copy / f"{name}.csv").read_bytes()
        yield Kind(f"rules {name}", (sound,), reworded, partial(_read_rules, copy, name), 100)
    archive = initramfs.newc([initramfs.folder("dev"), initramfs.program("init", b"\x7fELF" * 50)])
    yield Kind("initrd", (archive, elf_images.zlib_gzip(archive)), mangled, _read_initrd)


def _documents(folder: Path) -> "Iterator[Kind]":
    for name, document, read, dear in (
        ("scan document", golden_documents.scan_clean(), read_scan, 1),
        ("explore document", golden_documents.explore(), _read_baseline, 4),
        ("verify document", golden_documents.verify(), verify_baseline.load, 1),
    ):
        seed = msgspec.json.encode(document)
        path = folder / f"{name.replace(' ', '-')}.json"
        yield Kind(name, (seed,), retyped, partial(_from_file, path, read), dear)


def _talk(folder: Path) -> "Iterator[Kind]":
    packets = b"".join(map(gdb_packet, (b"qSupported:xmlRegisters=i386", b"m1000,40", b"vCont;c")))
    yield Kind("gdb packets", (packets + b"\x03+",), mangled, _read_packets)
    answers = b"OK 0x1234\nIRQ raise 4\nIRQ lower 4\nOK 0\nOK 0xffffffffffffffff\n" + b"OK\n" * 3
    yield Kind("qtest answers", (answers,), mangled, _read_answers)
    yield Kind("arguments", (b"",), _arguments, _run_command, 4)
    yield Kind("names", (b"caf\xc3\xa9\x1b[0m",), mangled, _print)
    for name in _LIVE:
        (folder / "root" / name).parent.mkdir(parents=True, exist_ok=True)
    texts = (b"tsc\n", b"32768\n", b"9" * 5000, "٣²".encode(), b"pci:v00001AF4d00001041sv*\n")
    yield Kind("files of a live kernel", texts, mangled, partial(_inspect, folder / "root"))


def _read_vmlinux(data: bytes) -> None:
    elf = ElfFile.open(data)
    with Binary(VMLINUX, elf) as binary:
        _look(binary)
        devicetables.read(elf)
        kernelimage.load(kernelimage.vmlinux(elf), RAM)


def _read_module(data: bytes) -> None:
    code = ElfFile.open(data)
    with Binary.of_module("demo", code, code) as binary:
        _look(binary)


def _look(binary: Binary) -> None:
    """Ask of a binary what a scan asks."""
    _ = len(binary.functions), binary.externals, binary.code_spans, binary.alternatives
    for section in binary.text:
        for address in range(section.address, min(section.end, section.address + 64), 8):
            binary.chain(address)
            binary.object_at(address)
            binary.section_at(address)


def _read_btf(data: bytes) -> None:
    btf = Btf.parse(data)
    btf.functions()
    for name in ("paravirt_patch_template", "pv_cpu_ops"):
        btf.struct(name)
    btf.enum("insn_mmio_type")
    for index in range(min(len(btf), 200)):
        with suppress(BadImageError):  # not each type is that of a value
            btf.type_name(index)


def _read_orc(data: bytes) -> None:
    cut = len(data) * 2 // 5 // 4 * 4
    table = OrcTable.parse(data[:cut], 0xFFFFFFFF82E8F000, data[cut:], 3)
    for address in range(0xFFFFFFFF82E8E000, 0xFFFFFFFF82E8F000, 0x80):
        table.find(address)


def _read_compressed(data: bytes) -> None:
    assert len(decompress(data, limit=MIB)) <= MIB


def _read_boot_image(data: bytes) -> None:
    if is_boot_image(data):
        unpack_vmlinuz(data)
    kernelimage.load(kernelimage.boot_image(data, "vmlinuz"), RAM)


def _read_scenario(data: bytes) -> None:
    scenario.parse(data, "scenario.toml", "scenario")


def _read_rules(folder: Path, name: str, data: bytes) -> None:
    with _file(folder / f"{name}.csv", data):
        lint_folder(folder)
        tables.load_folder(folder)


def _read_initrd(data: bytes) -> None:
    initramfs.check(data, "initrd")


def _read_baseline(path: Path) -> None:
    baseline.verdicts(*baseline.load(path))


def _from_file(path: Path, read: Callable[[Path], object], data: bytes) -> None:
    with _file(path, data):
        read(path)


class _file:  # noqa: N801 - reads as the function that it is
    """Puts bytes in place of a file, whose own come back."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            self._path.unlink()
        else:
            self._path.write_bytes(self._before)


def _store(folder: Path) -> bytes:
    path = folder / "seed.sqlite"
    with Store.open(path, {"kernel": "6.12"}, resume=False) as store:
        document = golden_documents.explore()
        for window in document.windows:
            store.add_window(window)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=DELETE")
    return path.read_bytes()


# What somebody else's SQL may have left in a file.
_STATEMENTS = (
    "UPDATE window SET document = NULL",
    "UPDATE window SET document = zeroblob({n})",
    "UPDATE window SET scenario = x'ff1b5d'",
    "UPDATE campaign SET value = {n}",
    "DELETE FROM campaign",
    "DROP TABLE run",
    "CREATE TABLE {w} (a)",
    "CREATE VIEW v AS WITH RECURSIVE t(a) AS (SELECT 1 UNION ALL SELECT a FROM t) SELECT * FROM t",
    "CREATE TRIGGER t AFTER INSERT ON campaign BEGIN DELETE FROM run; END",
    "ALTER TABLE window RENAME TO {w}",
    "ALTER TABLE run ADD COLUMN {w} TEXT",
    "PRAGMA user_version = {n}",
    "PRAGMA application_id = {n}",
    "PRAGMA writable_schema = ON",
    "UPDATE sqlite_schema SET sql = replace(sql, 'TEXT', {w})",
    "UPDATE sqlite_schema SET rootpage = {n}",
    "INSERT INTO campaign SELECT hex(randomblob(8)), zeroblob(1000) FROM window, window",
)  # fmt: skip


def _queried(rng: Random, data: bytes) -> bytes:
    """Run SQL on a store, damage its pages, or both."""
    if rng.randrange(3):
        data = _with_statements(rng, data)
    if rng.randrange(2):
        hot = [(0, 100), *((page, page + 24) for page in range(0, len(data), 4096))]
        data = mangled(rng, data, hot)
    return data


def _with_statements(rng: Random, data: bytes) -> bytes:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.deserialize(data)
        for _ in range(rng.randint(1, 3)):
            word = "'" + rng.choice(WORDS[3:]).replace("'", "''").replace("\0", "")[:50] + "'"
            text = rng.choice(_STATEMENTS)
            with suppress(sqlite3.Error, UnicodeError):
                database.execute(text.format(n=rng.choice(NUMBERS[:6]) % 100_000, w=word))
        return database.serialize()


def _read_store(path: Path, data: bytes) -> None:
    with _file(path, data):
        try:
            baseline.verdicts(*baseline.load(path))
            with Store.open(path, {"kernel": "6.12"}, resume=True):
                pass
        finally:
            for beside in path.parent.glob(f"{path.name}-*"):
                beside.unlink()


def _read_packets(data: bytes) -> None:
    decoder = Decoder()
    for start in range(0, len(data), 7):
        decoder.feed(data[start : start + 7])


def _read_answers(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with closing(theirs):
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with closing(Qtest(ours, lambda *_: None)) as qtest:
            for _ in range(3):
                qtest.read_port(0x70, 1)
            qtest.write_memory(0x1000, 4, 5)


# Words of command lines, some of which fit together.
_WORDS = [
    "scan", "boot", "explore", "verify", "tradeoff", "filter", "rules", "schema", "man",
    "completion", "check", "show", "export", "live", "explain", "diff", "lint", "--help", "-v",
    "-vv", "--format", "json", "text", "sarif", "csv", "xml", "-o", "/dev/null", "--workers",
    "--memory", "--timeout", "--baseline", "--allow", "--scenario", "--store", "--resume",
    "--seconds", "--device", "--module-version", "1.5.01", "RDMSR", "0x1a0", "msr", "syscall-gap",
    "/nonexistent/kernel", "bash",
]  # fmt: skip


def _arguments(rng: Random, _: bytes) -> bytes:
    words = [rng.choice(_WORDS[:10])]
    for _ in range(rng.randint(0, 6)):
        pool = rng.choice([_WORDS, _WORDS, WORDS, [str(number) for number in NUMBERS]])
        words.append(rng.choice(pool).replace("\0", ""))
    return "\0".join(words).encode("utf-8", "surrogatepass")


def _run_command(data: bytes) -> None:
    words = os.fsdecode(data).split("\0") if data else []
    code = command_line([word for word in words if word != "deb"])
    assert ExitCode(code) is not ExitCode.INTERNAL, words


def _print(data: bytes) -> None:
    shown = printable(os.fsdecode(data))
    assert shown.isprintable(), shown
    shown.encode()


# Files that `filter live` reads; all hold the same.
_LIVE = (
    "proc/cpuinfo",
    "proc/interrupts",
    "sys/bus/pci/devices/0000:00:01.0/modalias",
    "sys/devices/system/clocksource/clocksource0/available_clocksource",
    "sys/devices/system/clocksource/clocksource0/current_clocksource",
    "sys/kernel/debug/swiotlb/io_tlb_nslabs",
    "sys/kernel/debug/swiotlb/io_tlb_used",
)


def _inspect(root: Path, data: bytes) -> None:
    for name in _LIVE:
        (root / name).write_bytes(data)
    inspect(root, listfile.load())


def _same(folder: Path) -> tuple[str, ...]:
    """Flags that leave the folder's name, another each time, out of debug information."""
    return ("-g", "-gno-record-gcc-switches", f"-fdebug-prefix-map={folder}=/build")


def _loadable(vmlinux: bytes) -> bytes:
    """Give segments the physical addresses that a kernel's have: from 16 MiB on."""
    image = bytearray(vmlinux)
    (headers,) = struct.unpack_from("<Q", image, 0x20)
    size, count = struct.unpack_from("<2H", image, 0x36)
    struct.pack_into("<Q", image, 0x18, 0x1000000)  # the entry, which is physical
    for at in range(headers, headers + size * count, size):
        (virtual,) = struct.unpack_from("<Q", image, at + 16)
        struct.pack_into("<Q", image, at + 24, virtual - 0xFFFFFFFF80000000 if virtual else 0)
    return bytes(image)


def _stripped(vmlinux: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "vmlinux"
        path.write_bytes(vmlinux)
        tiny_kernel.run(Path(name), "strip", "--strip-debug", path)
        return path.read_bytes()


def make_folder() -> Path:
    """Make a folder for a campaign's files, in memory where that can be."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="siege-", dir=base))
    for each in ("vmlinux", "module"):
        (folder / each).mkdir()
    return folder


def remove_folder(folder: Path) -> None:
    """Remove what `make_folder` made."""
    shutil.rmtree(folder)
