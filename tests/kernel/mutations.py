"""Damaged copies of a valid file, as a hypothesis strategy, and what may come of them."""

from contextlib import contextmanager

from hypothesis import strategies as st

from trapline.base.errors import BadImageError

# Values that hurt: sizes and offsets at the limits of their width.
NASTY = [
    bytes(4),
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00\x00\x00\x80",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x00\x00\x00\x00\x80",
    b"\x01\x00\x00\x00",
]


@st.composite
def damaged(draw, valid, *, header=512):
    """Overwrite some bytes, more often in the first `header` and last ones; maybe cut the end."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(
            st.one_of(
                st.integers(0, len(data) - 1),
                st.integers(0, min(header, len(data)) - 1),
                st.integers(max(0, len(data) - header), len(data) - 1),
            )
        )
        value = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NASTY)))
        data[place : place + len(value)] = value[: len(data) - place]
    if draw(st.integers(0, 3)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@contextmanager
def only_bad_image():
    """Let a BadImageError of one line pass, and nothing else."""
    try:
        yield
    except BadImageError as error:
        if "\n" in str(error):
            raise AssertionError(str(error)) from error
