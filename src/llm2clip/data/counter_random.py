"""Counter-based random numbers, computed by hashing a seed and counters such as the epoch and the image index.

Each random number depends only on the seed and the counters, and not on the batch, the number of ranks or the step at
which a run is resumed.

The hash function is based on SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014, https://doi.org/10.1145/2714064.2660195). Each counter selects an output of a SplitMix64 generator. The
selected output is the seed of the generator for the next counter.
"""

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hash_counters(seed: int, *counters: np.ndarray | int) -> np.ndarray:
    """Return 64 random bits per combination of counters, as a uint64 array with the broadcast shape of the counters.

    Raise ValueError if the seed is negative. The counters must not be negative.
    """
    if seed < 0:
        raise ValueError(f"the seed must be at least 0 (got {seed})")
    bits = np.array(seed % (1 << 64), np.uint64)
    with np.errstate(over="ignore"):  # all arithmetic is modulo 2^64
        for counter in counters:
            index = np.asarray(counter).astype(np.uint64)
            bits = _mix_bits(bits + (index + np.uint64(1)) * _GOLDEN_GAMMA)
    return bits


def convert_bits_to_unit_interval(bits: np.ndarray) -> np.ndarray:
    """Convert uint64 random bits to float64 values in [0, 1), using the upper 53 bits. The shape is unchanged."""
    return (bits >> np.uint64(11)) * (1.0 / (1 << 53))


def shuffle_row_prefixes(values: np.ndarray, counts: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Return a copy of `values` in which the first `counts[n]` values of each row `n` are shuffled.

    Args:
        values: Array of shape (N, M).
        counts: Number of values to shuffle in each row, of shape (N,).
        bits: Random sort keys, a uint64 array of shape (N, M).
    """
    is_used = np.arange(values.shape[1]) < counts[:, None]
    keys = np.where(is_used, bits, np.uint64(0xFFFFFFFFFFFFFFFF))
    return np.take_along_axis(values, np.argsort(keys, axis=1, kind="stable"), axis=1)


def _mix_bits(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _MULTIPLIER_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MULTIPLIER_2
    return np.asarray(bits ^ (bits >> np.uint64(31)))
