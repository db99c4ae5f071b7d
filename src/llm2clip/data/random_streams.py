"""Vectorised random number generators that draw the same numbers as NumPy generators.

A sample that depends only on (seed, epoch, image) needs its own random number generator. Creating and using one with
`np.random.default_rng([seed, epoch, image])` takes about 30 microseconds. `RandomStreams` uses array operations to draw
the same numbers for all images in a batch, which takes about 4 microseconds per image.

The algorithms are the same as NumPy's: `SeedSequence` hashes the seeds, PCG64 (XSL-RR 128/64,
https://www.pcg-random.org) generates the bits, and permutations are Fisher-Yates shuffles.
"""

from collections.abc import Sequence

import numpy as np

# Constants of SeedSequence, from numpy/random/bit_generator.pyx.
_POOL_SIZE = 4
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_MULT_L, _MIX_MULT_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_HALF_WORD = np.uint32(16)
# The multiplier of PCG64, as its upper and lower 64 bits.
_MULTIPLIER = np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645)
_ONE, _32_BITS, _LOW_32 = np.uint64(1), np.uint64(32), np.uint64(0xFFFFFFFF)


def draw_epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of shape (n,), int64, that depends only on `n`, the seed and the epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class RandomStreams:
    """N random number generators. Generator n is equivalent to `default_rng([seed, words[0][n], words[1][n], ...])`.

    Args:
        seed: Non-negative integer.
        words: Integer arrays of shape (N,) with values from 0 to 2 ** 32 - 1.
    """

    def __init__(self, seed: int, *words: np.ndarray) -> None:
        self._high, self._low, self._inc_high, self._inc_low = _seed_pcg64(_split_seeds_into_words(seed, words))
        # Each 64-bit output provides two 32-bit numbers. The upper half is saved for the next call.
        self._upper_half = np.zeros(len(self._high), np.uint64)
        self._has_upper_half = np.zeros(len(self._high), bool)

    def random(self) -> np.ndarray:
        """Draw a number in [0, 1) from each generator, like `Generator.random`. Return shape (N,), float64."""
        return (self._draw_64_bits(np.arange(len(self._high))) >> np.uint64(11)) * (1.0 / 9007199254740992.0)

    def shuffle(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Use generator n to permute the first `counts[n]` values of row n in place, like `Generator.permutation`.

        `values` has shape (N, largest count), and `counts` has shape (N,), int64.
        """
        for last in range(values.shape[1] - 1, 0, -1):
            rows = np.flatnonzero(counts > last)
            other = self._draw_integers(rows, last)
            values[rows, last], values[rows, other] = values[rows, other], values[rows, last]

    def _draw_integers(self, indices: np.ndarray, highest: int) -> np.ndarray:
        """Draw a random integer from 0 to `highest` (inclusive) from each generator in `indices`.

        Like NumPy, draw as many random bits as `highest` has, and draw again if the result is larger than `highest`.
        """
        mask = np.uint64((1 << highest.bit_length()) - 1)
        integers = self._draw_32_bits(indices) & mask
        too_large = np.flatnonzero(integers > highest)
        while len(too_large):
            integers[too_large] = self._draw_32_bits(indices[too_large]) & mask
            too_large = too_large[integers[too_large] > highest]
        return integers.astype(np.int64)

    def _draw_32_bits(self, indices: np.ndarray) -> np.ndarray:
        """Draw 32 random bits from each generator in `indices`. Return them as uint64."""
        has_upper_half = self._has_upper_half[indices]
        numbers = self._upper_half[indices]
        fresh = indices[~has_upper_half]
        outputs = self._draw_64_bits(fresh)
        numbers[~has_upper_half] = outputs & _LOW_32
        self._upper_half[fresh] = outputs >> _32_BITS
        self._has_upper_half[indices] = ~has_upper_half
        return numbers

    def _draw_64_bits(self, indices: np.ndarray) -> np.ndarray:
        """Draw 64 random bits from each generator in `indices`. Return them as uint64."""
        high, low = _multiply_128(self._high[indices], self._low[indices])
        high, low = _add_128(high, low, self._inc_high[indices], self._inc_low[indices])
        self._high[indices], self._low[indices] = high, low
        rotation, bits = high >> np.uint64(58), high ^ low
        return (bits >> rotation) | (bits << ((np.uint64(64) - rotation) & np.uint64(63)))


# ---- seeding ---------------------------------------------------------------------------------------------------------


def _split_seeds_into_words(seed: int, words: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Split the seeds into 32-bit words. Return a uint32 array of shape (N,) for each word."""
    if seed < 0:
        raise ValueError(f"the seed must be at least 0 (got {seed})")
    seed_words = [seed & 0xFFFFFFFF]
    while seed >= 1 << 32:
        seed >>= 32
        seed_words.append(seed & 0xFFFFFFFF)
    count = len(words[0])
    return [np.full(count, word, np.uint32) for word in seed_words] + [word.astype(np.uint32) for word in words]


def _seed_pcg64(words: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the upper and lower 64 bits of the generators' states and of their increments, each of shape (N,)."""
    pool = _mix_entropy(words)
    hash_constant = _SeedSequenceHash(_INIT_B, _MULT_B)
    state = [hash_constant.hash(pool[n % _POOL_SIZE]).astype(np.uint64) for n in range(8)]
    state_high, state_low, inc_high, inc_low = (state[n] | (state[n + 1] << _32_BITS) for n in range(0, len(state), 2))
    inc_high, inc_low = (inc_high << _ONE) | (inc_low >> np.uint64(63)), (inc_low << _ONE) | _ONE
    high, low = _add_128(inc_high, inc_low, state_high, state_low)
    high, low = _add_128(*_multiply_128(high, low), inc_high, inc_low)
    return high, low, inc_high, inc_low


def _mix_entropy(words: list[np.ndarray]) -> list[np.ndarray]:
    """Hash the seeds into a pool of four words, as `SeedSequence` does."""
    hash_constant = _SeedSequenceHash(_INIT_A, _MULT_A)
    padded = [*words, *[np.zeros_like(words[0])] * (_POOL_SIZE - len(words))]
    pool = [hash_constant.hash(word) for word in padded[:_POOL_SIZE]]

    def mix(target: int, word: np.ndarray) -> None:
        mixed: np.ndarray = _MIX_MULT_L * pool[target] - _MIX_MULT_R * hash_constant.hash(word)
        pool[target] = mixed ^ (mixed >> _HALF_WORD)

    for source in range(_POOL_SIZE):
        for target in range(_POOL_SIZE):
            if source != target:
                mix(target, pool[source])
    for word in padded[_POOL_SIZE:]:
        for target in range(_POOL_SIZE):
            mix(target, word)
    return pool


class _SeedSequenceHash:
    """Hash function of `SeedSequence`, whose constant changes with every call."""

    def __init__(self, constant: int, multiplier: int) -> None:
        self.constant, self.multiplier = constant, multiplier

    def hash(self, word: np.ndarray) -> np.ndarray:
        word = word ^ np.uint32(self.constant)
        self.constant = self.constant * self.multiplier & 0xFFFFFFFF
        word = word * np.uint32(self.constant)
        return word ^ (word >> _HALF_WORD)


# ---- 128-bit arithmetic ----------------------------------------------------------------------------------------------


def _multiply_128(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multiply 128-bit integers by PCG64's multiplier, modulo 2 ** 128. Return the upper and lower 64 bits."""
    factor_high, factor_low = _MULTIPLIER
    a, b = low >> _32_BITS, low & _LOW_32
    c, d = factor_low >> _32_BITS, factor_low & _LOW_32
    middle = a * d + ((b * d) >> _32_BITS)  # does not overflow 64 bits
    middle_2 = b * c + (middle & _LOW_32)
    upper_half_of_low_product = a * c + (middle >> _32_BITS) + (middle_2 >> _32_BITS)
    return upper_half_of_low_product + high * factor_low + low * factor_high, low * factor_low


def _add_128(
    high: np.ndarray, low: np.ndarray, other_high: np.ndarray, other_low: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add 128-bit integers modulo 2 ** 128. Return the upper and lower 64 bits of the sums."""
    total = low + other_low
    return high + other_high + (total < low).astype(np.uint64), total
