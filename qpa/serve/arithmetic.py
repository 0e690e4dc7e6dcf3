"""Functions whose results have the same bits in every process and on every machine with IEEE arithmetic.

IEEE 754 prescribes the result of +, -, *, / and of the square root to the last bit, but not that of sin, cos
and exp: numpy takes those from whatever library the processor suits. Here they are made of the former alone,
in float64, one elementwise operation of numpy after another. numpy carries each operation out by itself, so
that none is fused with the next. Sums are in an order that is written down; no BLAS is called.

The errors are below 2e-16 relative to 1 for sin and cos, and below 4e-16 of the result for exp.

Source: the reduction is that of Cody and Waite, Software Manual for the Elementary Functions (1980), chapters
6 and 8; the polynomials are Taylor's, with as many terms as float64 needs on the reduced interval.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_ARGUMENT = 1e5
"""The largest size of an angle in radians, beyond which the reduction would lose digits."""

MAX_EXPONENT = 700.0
"""The largest size of an argument of exp."""

_N_TERMS = 10
"""Terms of a polynomial on [-pi / 4, pi / 4]: the next one is below 1e-18."""

_PI = Fraction(3141592653589793238462643383279502884197169399375105820974944592307816406286, 10**75)
_LN_2 = Fraction(693147180559945309417232121458176568075500134360255254120680009493393621969, 10**75)


def sin_cos(angles: Array) -> tuple[Array, Array]:
    """Return the sine and the cosine of angles in radians, float64 of the same shape.

    Args:    angles: of at most MAX_ARGUMENT.
    """
    quarter, rest = _reduce(np.asarray(angles, np.float64), _HALF_PI)
    square = rest * rest
    sine, cosine = rest * _horner(square, _SINE), _horner(square, _COSINE)
    turned = quarter.astype(np.int64) & 3
    swapped = (turned & 1).astype(bool)
    sines, cosines = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(turned >= 2, -sines, sines), np.where((turned == 1) | (turned == 2), -cosines, cosines)


def exp(exponents: Array) -> Array:
    """Return e to the power of exponents, float64 of the same shape.

    Args:    exponents: of at most MAX_EXPONENT in size.
    """
    power, rest = _reduce(np.asarray(exponents, np.float64), _IN_LN_2)
    result: Array = np.ldexp(_horner(rest, _EXPONENTIAL), power.astype(np.int32))
    return result


def _parts(unit: Fraction) -> tuple[float, float, float, float]:
    """Return 1 / unit, and unit as a sum of three floats, of which the first two have 30 bits each.

    A number of up to 2**22 units times such a part has 52 bits, so that the products are exact.
    """
    first = _rounded(unit, 30)
    second = _rounded(unit - Fraction(first), 30)
    return float(1 / unit), first, second, float(unit - Fraction(first) - Fraction(second))


def _rounded(number: Fraction, n_bits: int) -> float:
    shift = n_bits - math.frexp(float(number))[1]
    return math.ldexp(round(number * Fraction(2) ** shift), -shift)


_HALF_PI, _IN_LN_2 = _parts(_PI / 2), _parts(_LN_2)

_SINE = [float(Fraction((-1) ** n, math.factorial(2 * n + 1))) for n in range(_N_TERMS)]
_COSINE = [float(Fraction((-1) ** n, math.factorial(2 * n))) for n in range(_N_TERMS)]
_EXPONENTIAL = [float(Fraction(1, math.factorial(n))) for n in range(_N_TERMS + 5)]


def _reduce(numbers: Array, unit: tuple[float, float, float, float]) -> tuple[Array, Array]:
    """Return the nearest whole number of units, and what is left, each float64."""
    inverse, first, second, third = unit
    n_units = np.rint(numbers * inverse)
    return n_units, ((numbers - n_units * first) - n_units * second) - n_units * third


def _horner(numbers: Array, coefficients: list[float]) -> Array:
    """Return the polynomial whose coefficients are given, that of the lowest power first."""
    result = np.full_like(numbers, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result *= numbers
        result += coefficient
    return result
