"""Hash-based random numbers, compared with SplitMix64 in Python integers."""

import numpy as np
import pytest

from llm2clip.data.counter_random import convert_bits_to_unit_interval, hash_counters, shuffle_row_prefixes

# Outputs for seed 1234567, published with the SplitMix64 task of Rosetta Code.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
MASK = 2**64 - 1


class SplitMix64:
    """Port of https://prng.di.unimi.it/splitmix64.c to Python integers."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def reference_hash(seed: int, *counters: int) -> int:
    """Seed a generator with output `counter` of the previous one, for each counter."""
    for counter in counters:
        generator = SplitMix64(seed)
        for _ in range(counter + 1):
            seed = generator.next()
    return seed


def test_hash_of_one_counter_is_the_published_output() -> None:
    reference = SplitMix64(1234567)
    assert [reference.next() for _ in PUBLISHED] == PUBLISHED
    assert hash_counters(1234567, np.arange(5)).tolist() == PUBLISHED


@pytest.mark.parametrize("seed", [0, 42, 2**32, 2**64 - 1])
def test_hash_equals_the_reference_for_broadcast_counters(seed: int) -> None:
    epochs, images, draws = np.array([0, 3]), np.array([[7], [0], [200]]), 5
    bits = hash_counters(seed, epochs, images, draws)
    assert bits.dtype == np.uint64
    expected = [[reference_hash(seed, int(epoch), int(image), draws) for epoch in epochs] for image in images[:, 0]]
    assert bits.tolist() == expected


def test_negative_seeds_are_rejected() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        hash_counters(-1, 1)


def test_unit_interval_is_half_open() -> None:
    bits = np.array([0, 1 << 63, MASK], np.uint64)
    assert convert_bits_to_unit_interval(bits).tolist() == [0.0, 0.5, 1 - 2**-53]


def test_numbers_are_uniform_along_each_counter() -> None:
    """Chi-squared test of 100 bins; the 99.99% quantile for 99 degrees of freedom is 161."""
    n = 100_000
    for bits in (
        hash_counters(0, np.arange(n), 5, 0),
        hash_counters(0, 3, np.arange(n), 0),
        hash_counters(0, 3, 5, np.arange(n)),
    ):
        observed = np.bincount((convert_bits_to_unit_interval(bits) * 100).astype(int), minlength=100)
        assert ((observed - n / 100) ** 2 / (n / 100)).sum() < 161
        assert (
            abs(np.corrcoef(convert_bits_to_unit_interval(bits[1:]), convert_bits_to_unit_interval(bits[:-1]))[0, 1])
            < 0.015
        )


def test_all_permutations_of_a_row_are_equally_likely() -> None:
    """Chi-squared test of the 24 permutations; the 99.99% quantile for 23 degrees of freedom is 59."""
    n = 24_000
    bits = hash_counters(0, np.arange(n)[:, None], np.arange(4))
    permutations = shuffle_row_prefixes(np.tile(np.arange(4), (n, 1)), np.full(n, 4), bits)
    _, observed = np.unique(permutations @ [64, 16, 4, 1], return_counts=True)
    assert len(observed) == 24
    assert ((observed - n / 24) ** 2 / (n / 24)).sum() < 59


def test_shuffle_row_prefixes_leaves_the_values_after_the_count_in_place() -> None:
    values = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    bits = np.array([[9, 5, 7, 0], [3, 2, 1, 0], [0, 0, 0, 0]], np.uint64)
    shuffled = shuffle_row_prefixes(values, np.array([3, 4, 0]), bits)
    assert shuffled.tolist() == [[2, 3, 1, 4], [8, 7, 6, 5], [9, 10, 11, 12]]
