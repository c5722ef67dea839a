"""A random permutation of 0..n-1 that can be read anywhere without being stored.

A balanced Feistel network is a bijection on 2k-bit numbers; walking its cycles until the value falls below n
makes it one on 0..n-1 (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). So a shuffle of
10^8 rows needs memory only for the slice that is looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def mix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a 64-bit hash of a 64-bit number."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def hash_numbers(*numbers: int) -> int:
    """One 64-bit hash of several non-negative integers, each below 2**64; their order matters."""
    result = 0
    for number in numbers:
        result = mix64(result ^ mix64(number))
    return result


def _mix64_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """The permutation of 0..n-1 that `key` (a 64-bit integer) names.

    `permutation(start, stop)` gives its values at positions start..stop-1 as int64, shape (stop - start,).
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._half_bits = np.uint64(max(1, ((max(n, 2) - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = [np.uint64(hash_numbers(key, i)) for i in range(ROUNDS)]

    def _feistel(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._half_mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix64_array(right ^ round_key) & self._half_mask)
        return (left << self._half_bits) | right

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        values = self._feistel(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)
