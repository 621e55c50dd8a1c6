"""Framing of the remote protocol: whole packets, cut packets, damaged packets, floods."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapline.machine.gdb.codec import MAX_PACKET, Decoder, Signal, encode


def test_a_packet_has_its_checksum():
    assert encode(b"OK") == b"$OK#9a"
    assert encode(b"") == b"$#00"


def test_special_bytes_are_escaped():
    assert encode(b"}$#*")[1:-3] == b"}\x5d}\x04}\x03}\x0a"


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"$g#67", [b"g"]),
        (b"+$g#67-", [Signal.ACK, b"g", Signal.NACK]),
        (b"\x03", [Signal.INTERRUPT]),
        (b"noise$g#67", [b"g"]),
        (b"$g#68", [Signal.CORRUPT]),
        (b"$g#zz$g#67", [Signal.CORRUPT, b"g"]),
        (b"$gar$g#67", [b"g"]),
        (b"$a}\x03b#%02x" % (sum(b"a}\x03b") & 0xFF), [b"a#b"]),
        (b"$}#7d", [b""]),
        (b"$g", []),
    ],
)
def test_streams_are_decoded(data, events):
    assert Decoder().feed(data) == events


def test_a_packet_without_end_takes_no_memory_and_the_next_one_is_read():
    decoder = Decoder()
    assert decoder.feed(b"$" + b"a" * (MAX_PACKET + 5) * 3) == []
    assert len(decoder._raw) <= MAX_PACKET
    assert decoder.feed(b"#00$g#67") == [Signal.CORRUPT, b"g"]


def test_an_interrupt_inside_a_packet_is_data():
    assert Decoder().feed(b"$\x03#03") == [b"\x03"]


@given(st.lists(st.binary(max_size=300)), st.lists(st.integers(1, 40), min_size=1))
def test_what_is_encoded_comes_back_however_it_is_cut(payloads, cuts):
    stream = b"".join(encode(payload) for payload in payloads)
    decoder, events, position = Decoder(), [], 0
    for cut in itertools.cycle(cuts):
        if position >= len(stream):
            break
        events += decoder.feed(stream[position : position + cut])
        position += cut
    assert events == payloads


@given(st.binary(max_size=500))
def test_any_bytes_are_survived(data):
    decoder = Decoder()
    for event in decoder.feed(data):
        assert isinstance(event, (bytes, Signal))
    assert decoder.feed(b"#00#00$g#67")[-1] == b"g"
