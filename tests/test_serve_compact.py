"""The compact file: byte by byte, round trips, and everything that may be wrong with one."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as array_of

from qpa.errors import DocumentError
from qpa.serve.compact import Compact

BASIS, LAYOUT = bytes(range(32)), bytes(range(32, 64))
SMALL = Compact(BASIS, LAYOUT, False, (np.float32([1.5, -3.0]), np.float32([0.25])))
FILES = {numbers: SMALL.as_bytes(numbers) for numbers in ("float32", "int16")}

finite = st.floats(-(2.0**127), 2.0**127, width=32)
numbers = array_of(np.float32, st.integers(0, 9), elements=finite)


def signed(content):
    """Return content with the checksum that belongs to it, so that what is behind it is reached."""
    return content + hashlib.sha256(content).digest()


def refusal(content):
    with pytest.raises(DocumentError) as caught:
        Compact.parse("tenant", content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_bytes_are_those_of_the_format():
    head = b"QPAC" + b"\x01\x00" + b"\x00" + b"\x00" + BASIS + LAYOUT + b"\x02\x00"
    body = struct.pack("<II", 2, 1) + struct.pack("<3f", 1.5, -3.0, 0.25)
    assert FILES["float32"] == signed(head + body)
    head = b"QPAC" + b"\x01\x00" + b"\x01" + b"\x00" + BASIS + LAYOUT + b"\x02\x00"
    body = struct.pack("<IfIf", 2, np.float32(3) / np.float32(32767), 1, np.float32(0.25) / np.float32(32767))
    assert FILES["int16"] == signed(head + body + struct.pack("<3h", 16384, -32767, 32767))
    third = Compact(BASIS, LAYOUT, True, SMALL.arrays, bank=2)
    assert third.as_bytes()[:8] == b"QPAC" + b"\x01\x00" + b"\x00" + b"\x05"


@settings(deadline=None)
@given(
    st.lists(numbers, max_size=4),
    st.booleans(),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 127),
)
def test_float32_numbers_come_back(arrays, are_probabilities, digest, bank):
    compact = Compact(digest, LAYOUT, are_probabilities, tuple(arrays), bank)
    found = Compact.parse("tenant", compact.as_bytes())
    assert (found.basis, found.layout, found.are_probabilities) == (digest, LAYOUT, are_probabilities)
    assert found.bank == bank
    assert [one.tobytes() for one in found.arrays] == [one.tobytes() for one in arrays]


@settings(deadline=None)
@given(st.lists(numbers, max_size=4))
def test_integers_are_off_by_half_a_step_at_most(arrays):
    found = Compact.parse("tenant", Compact(BASIS, LAYOUT, False, tuple(arrays)).as_bytes("int16"))
    for before, after in zip(arrays, found.arrays, strict=True):
        wide = before.astype(np.float64)
        step = np.abs(wide).max(initial=0.0) / 32767
        assert np.all(np.abs(after - wide) <= step * (0.5 + 0.02) + 1e-40)


def test_sixty_numbers_are_within_512_bytes_and_4756_within_ten_thousand():
    sixty = Compact(BASIS, LAYOUT, False, (np.ones(59, np.float32), np.ones(1, np.float32)))
    many = Compact(BASIS, LAYOUT, False, tuple(np.ones(n, np.float32) for n in [226] * 21 + [10]))
    assert len(sixty.as_bytes("int16")) == 74 + 2 * 8 + 2 * 60 + 32
    assert len(many.as_bytes("int16")) <= 10_000


@pytest.mark.parametrize("numbers", FILES)
def test_every_truncation_is_refused(numbers):
    content = FILES[numbers]
    for n in range(len(content)):
        words = refusal(content[:n])
        assert "found" in words
    assert refusal(b"") == "tenant: expected a compact adapter, which starts with QPAC, found an empty file"
    assert "cut short" in refusal(content[:80])


@pytest.mark.parametrize("numbers", FILES)
def test_every_flipped_bit_is_found(numbers):
    content = FILES[numbers]
    for place in range(len(content)):
        for bit in range(8):
            refusal(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])


@settings(deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_hostile_bytes_give_one_line(content, has_start):
    start = b"QPAC\x01\x00" if has_start else b""
    try:
        Compact.parse("tenant", signed(start + content))
    except DocumentError as error:
        assert "\n" not in str(error)


@settings(deadline=None)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 65535), st.binary(max_size=60))
def test_hostile_fields_give_one_line(kind, flag, n_arrays, body):
    head = struct.pack("<4sHBB32s32sH", b"QPAC", 1, kind % 3, flag, BASIS, LAYOUT, n_arrays % 9)
    try:
        Compact.parse("tenant", signed(head + body))
    except DocumentError as error:
        assert "\n" not in str(error)


def test_a_newer_version_is_named_before_anything_else():
    content = bytearray(FILES["float32"])
    content[4] = 2
    expected = "tenant: expected version 1 of the format, found version 2; install a newer qpa"
    assert refusal(bytes(content)) == expected


def test_nan_is_refused_in_writing_and_in_reading():
    for bad in (np.nan, np.inf):
        with pytest.raises(DocumentError, match="expected finite numbers"):
            Compact(BASIS, LAYOUT, False, (np.float32([bad]),)).as_bytes()
        content = FILES["float32"][:-32]
        broken = content[:-4] + struct.pack("<f", bad)
        assert refusal(signed(broken)) == "tenant array 1: expected finite numbers, found NaN or infinity"
    content = FILES["int16"][:-32]
    for scale in (np.nan, np.inf, -1.0):
        assert "finite numbers" in refusal(signed(content[:78] + struct.pack("<f", scale) + content[82:]))


def test_lengths_that_do_not_add_up_are_refused():
    content = FILES["float32"][:-32]
    more = content[:74] + struct.pack("<I", 2**32 - 1) + content[78:]
    assert refusal(signed(more)).endswith("bytes, as its lengths say, found 126")
    assert "cut short" in refusal(signed(content[:72] + b"\xff\xff" + content[74:]))


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DocumentError, match="expected a file that can be read, found No such file"):
        Compact.read(tmp_path / "none")
    monkeypatch.setattr("qpa.serve.compact.MAX_BYTES", 100)
    (tmp_path / "tenant").write_bytes(FILES["float32"])
    with pytest.raises(DocumentError, match="expected at most 100 bytes, found more"):
        Compact.read(tmp_path / "tenant")
