"""sin, cos and exp out of + - * / alone: right, and with bits that are pinned."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpa.serve.arithmetic import MAX_ARGUMENT, MAX_EXPONENT, exp, sin_cos


@settings(deadline=None)
@given(st.floats(-MAX_ARGUMENT, MAX_ARGUMENT))
def test_sine_and_cosine_are_right_to_the_last_bits_of_one(angle):
    sine, cosine = (float(array[0]) for array in sin_cos(np.array([angle])))
    with mpmath.workdps(40):
        assert abs(mpmath.sin(angle) - sine) < 2.5e-16
        assert abs(mpmath.cos(angle) - cosine) < 2.5e-16


@settings(deadline=None)
@given(st.floats(-MAX_EXPONENT, MAX_EXPONENT))
def test_exp_is_right_to_its_last_bits(exponent):
    found = float(exp(np.array([exponent]))[0])
    with mpmath.workdps(40):
        assert abs(mpmath.exp(exponent) / found - 1) < 5e-16


@pytest.mark.parametrize("n", range(-9, 10))
def test_multiples_of_half_a_right_angle(n):
    angle = n * math.pi / 4
    sine, cosine = (float(array[0]) for array in sin_cos(np.array([angle])))
    with mpmath.workdps(40):
        assert abs(mpmath.sin(angle) - sine) < 1.2e-16
        assert abs(mpmath.cos(angle) - cosine) < 1.2e-16


def test_shapes_are_kept_and_float32_is_widened():
    angles = np.full((2, 3), 0.5, np.float32)
    sines, cosines = sin_cos(angles)
    assert sines.shape == cosines.shape == exp(angles).shape == (2, 3)
    assert sines.dtype == exp(angles).dtype == np.float64
    assert exp(np.array([0.0]))[0] == 1.0


GOLDEN_ANGLES = (0.1, -1.0, 2.5, 3.14159274101257324, -777.25, 99999.5)
GOLDEN_EXPONENTS = (0.1, -1.0, 2.5, -20.75, 699.5)
GOLDEN_BITS = {
    "sin": [
        "0x1.98eaecb8bcb2cp-4",
        "-0x1.aed548f090ceep-1",
        "0x1.326af0dcfcab0p-1",
        "-0x1.777a5cf72cec6p-24",
        "0x1.ea011c121539bp-1",
        "0x1.055f282f41bdap-1",
    ],
    "cos": [
        "0x1.fd712f9a817c0p-1",
        "0x1.14a280fb5068cp-1",
        "-0x1.9a2f7ef858b7dp-1",
        "-0x1.fffffffffffdep-1",
        "-0x1.28ea73a56e75dp-2",
        "-0x1.b8428c9f69a31p-1",
    ],
    "exp": [
        "0x1.1aec7b35a00d4p+0",
        "0x1.78b56362cef38p-2",
        "0x1.85d6fd931e0bbp+3",
        "0x1.0ba06b3d9c887p-30",
        "0x1.1f0df6d72215ep+1009",
    ],
}


def test_the_bits_are_pinned():
    sines, cosines = sin_cos(np.array(GOLDEN_ANGLES))
    found = {"sin": [x.hex() for x in sines.tolist()], "cos": [x.hex() for x in cosines.tolist()]}
    found["exp"] = [x.hex() for x in exp(np.array(GOLDEN_EXPONENTS)).tolist()]
    assert found == GOLDEN_BITS
