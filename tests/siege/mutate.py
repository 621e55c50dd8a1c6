"""Damaged copies of valid input: bytes, lines of text, trees of values."""

import json
import random
import struct
from typing import Any

NUMBERS = [
    0,
    1,
    -1,
    2**7,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
]
WORDS = [
    "\x1b]0;owned\x07", "\x1b[31m", "\u202e", "\ud800", "\0", "\n", "'", '"', "=1+1", "</script>",
    "..", "/", "../../etc/passwd", "A" * 5000, "1" * 5000, "nan", "inf", "true", "{}", "[", "%s%n",
]  # fmt: skip


def mangled(rng: random.Random, data: bytes, hot: list[tuple[int, int]] = ()) -> bytes:
    """Overwrite, insert and delete bytes, mostly in the `hot` spans; maybe cut the end."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 6, 20])):
        if not out:
            break
        at = _place(rng, len(out), hot)
        match rng.randrange(10):
            case 0:
                del out[at : at + rng.randint(1, 64)]
            case 1:
                out[at:at] = rng.randbytes(rng.randint(1, 16))
            case 2:
                source = rng.randrange(len(out))
                piece = out[source : source + rng.choice([4, 8, 24, 64])]
                out[at : at + len(piece)] = piece
            case 3:
                out[at] ^= 1 << rng.randrange(8)
            case 4:
                _add(rng, out, at)
            case 5 | 6:
                piece = rng.randbytes(rng.randint(1, 8))
                out[at : at + len(piece)] = piece
            case _:
                width = rng.choice([1, 2, 4, 8])
                at -= at % width
                value = rng.choice(NUMBERS) + rng.randint(-2, 2)
                out[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    if rng.randrange(12) == 0:
        del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def _place(rng: random.Random, size: int, hot: list[tuple[int, int]]) -> int:
    if hot and rng.randrange(8):
        start, end = rng.choice(hot)
        if start < end and start < size:
            return rng.randrange(start, min(end, size))
    return rng.randrange(size)


def _add(rng: random.Random, out: bytearray, at: int) -> None:
    """Change a little-endian number by a little."""
    width = rng.choice([2, 4, 8])
    at = max(0, min(at - at % width, len(out) - width))
    field = bytes(out[at : at + width])
    value = int.from_bytes(field, "little") + rng.choice([-1, 1, 8, -8, 0x1000])
    out[at : at + len(field)] = (value & (1 << 8 * len(field)) - 1).to_bytes(len(field), "little")


def reworded(rng: random.Random, data: bytes) -> bytes:
    """Text with lines lost, doubled, swapped, and words replaced; at times mangled as bytes."""
    if rng.randrange(6) == 0:
        return mangled(rng, data)
    lines = data.decode().splitlines(keepends=True)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                lines.insert(rng.randrange(len(lines)), lines[at])
            case 1 if len(lines) > 1:
                del lines[at]
            case 2:
                lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
            case _:
                lines[at] = _reworded_line(rng, lines[at])
    return "".join(lines).encode("utf-8", "surrogatepass")


def _reworded_line(rng: random.Random, line: str) -> str:
    words = line.split(" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice(
        [
            str(rng.choice(NUMBERS)),
            rng.choice(WORDS),
            words[at] + rng.choice(WORDS),
            hex(abs(rng.choice(NUMBERS))),
            "[" * rng.choice([1, 10, 5000]),
            "",
        ]
    )
    return " ".join(words)


def retyped(rng: random.Random, data: bytes) -> bytes:
    """A JSON document with values of other kinds, keys lost or new; at times mangled as bytes."""
    if rng.randrange(6) == 0:
        return mangled(rng, data)
    tree = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        tree = _with_change(rng, tree)
    text = json.dumps(tree)
    if rng.randrange(50) == 0:
        text = "[" * 20_000 + text
    return text.encode()


def _with_change(rng: random.Random, tree: Any) -> Any:
    """Change one value below `tree`, all depths alike."""
    node, depth = tree, rng.randrange(8)
    while depth and isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if depth == 1 or not isinstance(node[key], dict | list):
            _change(rng, node, key)
            return tree
        node, depth = node[key], depth - 1
    return tree if depth else _value(rng)


def _change(rng: random.Random, node: Any, key: Any) -> None:
    match rng.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(WORDS)] = node[key]
        case 2 if isinstance(node[key], list) and node[key]:
            node[key] = node[key] * rng.choice([2, 50])
        case _:
            node[key] = _value(rng)


def _value(rng: random.Random) -> Any:
    nested: Any = 1
    for _ in range(rng.choice([1, 3, 300])):
        nested = [nested]
    return rng.choice(
        [
            None,
            True,
            rng.choice(NUMBERS),
            0.5,
            -1e308,
            rng.choice(WORDS),
            [],
            {},
            nested,
            [None] * 9,
        ]
    )


def sections(image: bytes, wanted: str = "") -> list[tuple[int, int]]:
    """Return the spans of an ELF file's headers and of the sections whose name starts so."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<3H", image, 0x3A)
    rows = [struct.unpack_from("<2I4Q", image, table + size * index) for index in range(count)]
    base = rows[names][4]
    found = []
    for name, kind, _, _, offset, length in rows:
        text = image[base + name : image.index(b"\0", base + name)].decode()
        if text.startswith(wanted) and kind != 8 and length:
            found.append((offset, offset + length))
    return found if wanted else [(0, 64), (table, table + size * count), *found]
