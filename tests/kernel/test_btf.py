"""BTF: what gcc and pahole write, and what an attacker might."""

import shutil
import struct
import subprocess

import drgn
import pytest
from hypothesis import given
from mutations import damaged, only_bad_image

from trapline.base.errors import BadImageError
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.types.btf import Btf, Member
from trapline.kernel.types.btftable import Kind

SOURCE = """
typedef unsigned long size_t;
struct list { struct list *next, **prev; };
enum state { OFF, ON = 5, LAST = 0x7fffffff };
enum sign { MINUS = -3, PLUS = 3 };
typedef struct { int counter; } atomic_t;
struct device {
    struct list node;
    union {
        long whole;
        struct { short low; volatile short high; };
    };
    unsigned int ready : 1, mode : 3, : 20, tail : 8;
    const char *const name;
    int (*probe)(struct device *, const void *, size_t);
    char label[6];
    void (*table[4])(void);
    enum state state;
    atomic_t count;
    struct unseen *later;
};
union both { int i; float f; };
struct device *the_device;
union both the_union;
enum sign the_sign;
int printf_like(const char *format, ...) { return *format; }
struct device *find(struct list *head, size_t index, int (*match)(struct device *))
{ return match((struct device *)head) ? the_device + index : 0; }
"""


def compiled(tmp_path, source):
    """Let gcc write BTF."""
    path = tmp_path / "types.c"
    path.write_text(source)
    compiler = shutil.which("gcc")
    subprocess.run([compiler, "-gbtf", "-c", path, "-o", tmp_path / "types.o"], check=True)
    with ElfFile.open(tmp_path / "types.o") as elf:
        return bytes(elf.contents(".BTF"))


@pytest.fixture(scope="module")
def btf(tmp_path_factory):
    return Btf.parse(compiled(tmp_path_factory.mktemp("btf"), SOURCE))


class Builder:
    """Writes BTF by hand; types count from `first`."""

    def __init__(self, first=1, first_string=0):
        self.types = b""
        self.strings = b"\0"
        self.next = first
        self.first_string = first_string

    def string(self, text):
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return self.first_string + len(self.strings) - len(text) - 1

    def add(self, kind, name="", target=0, items=(), *, layout="<III", vlen=None, flag=0):
        info = flag << 31 | kind << 24 | (len(items) if vlen is None else vlen)
        self.types += struct.pack("<III", self.string(name), info, target)
        self.types += b"".join(struct.pack(layout, *item) for item in items)
        self.next += 1
        return self.next - 1

    def integer(self, name="int"):
        return self.add(Kind.INT, name, 4, [(0x20,)], layout="<I", vlen=0)

    def build(self):
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


def test_members_with_offsets(btf):
    assert btf.struct("list") == {
        "next": Member(0, "struct list *"),
        "prev": Member(8, "struct list **"),
    }
    assert btf.struct("device") == {
        "node": Member(0, "struct list"),
        "whole": Member(16, "long int"),
        "low": Member(16, "short int"),
        "high": Member(18, "volatile short int"),
        "ready": Member(24, "unsigned int"),
        "mode": Member(24, "unsigned int"),
        "tail": Member(27, "unsigned int"),
        "name": Member(32, "const char *const"),
        "probe": Member(40, "int (*)(struct device *, const void *, size_t)"),
        "label": Member(48, "char [6]"),
        "table": Member(56, "void (*[4])(void)"),
        "state": Member(88, "enum state"),
        "count": Member(92, "atomic_t"),
        "later": Member(96, "struct unseen *"),
    }
    assert btf.size("device") == 104


def test_unions_typedefs_and_absent_names(btf):
    assert set(btf.struct("both")) == {"i", "f"}
    assert btf.struct("atomic_t") == {"counter": Member(0, "int")}
    assert btf.struct("size_t") is None
    assert btf.struct("absent") is None
    assert btf.size("absent") is None
    assert btf.enum("absent") is None


def test_enumerators(btf):
    assert btf.enum("state") == {"OFF": 0, "ON": 5, "LAST": 0x7FFFFFFF}


def test_functions(btf):
    found = btf.functions()["find"]
    assert found.returns == "struct device *"
    assert [name for name, _ in found.parameters] == ["head", "index", "match"]
    assert found.signature == ("struct device * (struct list *, size_t, int (*)(struct device *))")
    assert btf.functions()["printf_like"].signature == "int (const char *, ...)"


def test_signed_and_wide_enumerators():
    builder = Builder()
    low, high = builder.string("LOW"), builder.string("HIGH")
    builder.add(Kind.ENUM, "small", 4, [(low, 0xFFFFFFFD)], layout="<II", flag=1)
    builder.add(Kind.ENUM64, "wide", 8, [(high, 0xFFFFFFFF, 0xFFFFFFFF)])
    builder.add(Kind.ENUM64, "below", 8, [(low, 0xFFFFFFFE, 0xFFFFFFFF)], flag=1)
    btf = Btf.parse(builder.build())
    assert btf.enum("small") == {"LOW": -3}
    assert btf.enum("wide") == {"HIGH": (1 << 64) - 1}
    assert btf.enum("below") == {"LOW": -2}


def test_bit_fields_with_the_kind_flag():
    builder = Builder()
    number = builder.integer()
    name = builder.string("bits")
    builder.add(Kind.STRUCT, "s", 8, [(name, number, 3 << 24 | 37)], flag=1)
    assert Btf.parse(builder.build()).struct("s") == {"bits": Member(4, "int")}


def test_arrays_of_arrays():
    # By hand: gcc 12 writes the dimensions in reverse (its bug 114186), pahole does not.
    builder = Builder()
    number = builder.integer("char")
    builder.add(Kind.ARRAY, items=[(number, number, 3)], vlen=0)
    builder.add(Kind.ARRAY, items=[(2, number, 2)], vlen=0)
    builder.add(Kind.PTR, target=3)
    btf = Btf.parse(builder.build())
    assert btf.type_name(3) == "char [2][3]"
    assert btf.type_name(4) == "char (*)[2][3]"


def test_a_module_continues_the_base():
    first = Builder()
    number = first.integer()
    first.add(Kind.STRUCT, "base", 4, [(first.string("x"), number, 0)])
    base = Btf.parse(first.build())
    second = Builder(first=len(base), first_string=len(first.strings))
    proto = second.add(
        Kind.FUNC_PROTO, target=number, items=[(second.string("b"), 2)], layout="<II"
    )
    second.add(Kind.FUNC, "probe", proto)
    second.add(Kind.STRUCT, "own", 4, [(second.string("y"), number, 32)])
    module = Btf.parse(second.build(), base=base)
    assert module.struct("base") == {"x": Member(0, "int")}
    assert module.struct("own") == {"y": Member(4, "int")}
    assert module.functions()["probe"].signature == "int (struct base)"
    assert len(module) == len(base) + 3


def self_reference():
    builder = Builder()
    builder.add(Kind.STRUCT, "s", 8, [(builder.string("m"), 2, 0)])
    builder.add(Kind.PTR, target=2)
    return builder.build()


def endless_typedef():
    builder = Builder()
    builder.add(Kind.TYPEDEF, "s", 2)
    builder.add(Kind.TYPEDEF, "t", 1)
    return builder.build()


def nested_anonymous(levels=40):
    """Each level holds the next twice: 2**40 members in 1.5 KB."""
    builder = Builder()
    for level in range(levels):
        inner = level + 2
        builder.add(Kind.STRUCT, "" if level else "s", 8, [(0, inner, 0), (0, inner, 0)])
    builder.add(Kind.STRUCT, "", 0)
    return builder.build()


def nested_functions(levels=60, width=50):
    """Each prototype takes the next many times over."""
    builder = Builder()
    builder.add(Kind.STRUCT, "s", 8, [(builder.string("m"), 2, 0)])
    for level in range(levels):
        builder.add(Kind.FUNC_PROTO, "", 0, [(0, level + 3)] * width, layout="<II")
    builder.integer()
    return builder.build()


def dangling():
    builder = Builder()
    builder.add(Kind.STRUCT, "s", 8, [(builder.string("m"), 99, 0)])
    return builder.build()


def bad_name():
    builder = Builder()
    builder.add(Kind.STRUCT, "s", 8, [(1 << 30, 0, 0)])
    return builder.build()


def not_a_value():
    builder = Builder()
    builder.add(Kind.STRUCT, "s", 8, [(builder.string("m"), 2, 0)])
    builder.add(Kind.FUNC, "f", 0)
    return builder.build()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (self_reference(), "refers to itself"),
        (endless_typedef(), "refers to itself"),
        (nested_anonymous(), "has no end"),
        (nested_functions(), "has no end"),
        (dangling(), "type 99 does not exist"),
        (bad_name(), "outside of the strings"),
        (not_a_value(), "is not the type of a value"),
    ],
)
def test_hostile_references(data, message):
    btf = Btf.parse(data, name="vmlinux")
    with pytest.raises(BadImageError, match=rf"^vmlinux: .*{message}"):
        btf.struct("s")


VALID = nested_anonymous(2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated within its header"),
        (VALID[:20], "truncated within its header"),
        (VALID[:40], "is truncated"),
        (b"\xeb\x9f" + VALID[2:], "not little-endian BTF"),
        (VALID[:2] + b"\x02" + VALID[3:], "not little-endian BTF"),
        (VALID[:-1] + b"x", "strings have no end"),
        (VALID[:31] + b"\x1f" + VALID[32:], "kind 31 is not known"),
        (VALID[:28] + b"\xff\xff" + VALID[30:], "truncated within a type"),
        (VALID[:4] + b"\x08" + VALID[5:], "is truncated"),
    ],
)
def test_hostile_tables(data, message):
    with pytest.raises(BadImageError, match=message):
        Btf.parse(data)


def test_functions_that_share_a_huge_prototype_cost_it_once():
    builder = Builder()
    number = builder.integer()
    proto = builder.add(Kind.FUNC_PROTO, "", number, [(0, number)] * 60_000, layout="<II")
    name = builder.string("f")
    record = struct.pack("<III", name, Kind.FUNC << 24, proto)
    builder.types += record * 100_000
    found = Btf.parse(builder.build()).functions()
    assert len(found["f"].parameters) == 60_000


def sample():
    builder = Builder()
    number = builder.integer()
    pointer = builder.add(Kind.PTR, target=5)
    builder.add(Kind.ARRAY, "", 0, [(number, number, 4)], vlen=0)
    builder.add(Kind.CONST, "", number)
    builder.add(Kind.STRUCT, "s", 16, [(builder.string("p"), pointer, 0), (0, 6, 64)])
    builder.add(Kind.UNION, "", 8, [(builder.string("a"), 3, 0), (builder.string("c"), 4, 0)])
    builder.add(Kind.FUNC_PROTO, "", 1, [(builder.string("x"), 2)], layout="<II")
    builder.add(Kind.FUNC, "f", 7)
    builder.add(Kind.TYPEDEF, "t", 5)
    builder.add(Kind.ENUM, "e", 4, [(builder.string("A"), 1)], layout="<II")
    return builder.build()


@given(damaged(sample(), header=200))
def test_only_bad_image_error_escapes(data):
    with only_bad_image():
        btf = Btf.parse(data)
        for name in ("s", "t", "e"):
            btf.struct(name)
            btf.size(name)
            btf.enum(name)
        btf.functions()
        for index in range(len(btf)):
            btf.type_name(index)


@pytest.mark.kernel
def test_debian_kernel_agrees_with_its_dwarf(debian_kernel):
    program = drgn.Program()
    image = program.extra_module("vmlinux", create=True)
    image.try_file(str(debian_kernel.vmlinux), force=True)
    with ElfFile.open(debian_kernel.vmlinux) as elf:
        btf = Btf.parse(elf.contents(".BTF"))
    for name in ("pt_regs", "virtio_device", "virtio_config_ops", "list_head", "ve_info"):
        expected = {
            member.name: member.bit_offset // 8 for member in program.type(f"struct {name}").members
        }
        found = btf.struct(name)
        assert {key: found[key].offset for key in expected if key} == {
            key: value for key, value in expected.items() if key
        }
        assert btf.size(name) == program.type(f"struct {name}").size
    functions = btf.functions()
    assert len(functions) > 40_000
    assert functions["ioread32"].signature == "unsigned int (const void *)"
