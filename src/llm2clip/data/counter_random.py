"""Counter-based random numbers: hashes of a seed and of counters, such as the epoch, the image and the draw.

A sample does not depend on the other samples in its batch, on the ranks, or on the step from which a run is resumed.

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
https://doi.org/10.1145/2714064.2660195): in `hash_counters(seed, epoch, image)`, output `epoch` of the first generator
seeds the second one, and so on.
"""

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hash_counters(seed: int, *counters: np.ndarray | int) -> np.ndarray:
    """Return 64 random bits per combination of counters, as a uint64 array with the broadcast shape of the counters.

    The seed and the counters must not be negative.
    """
    if seed < 0:
        raise ValueError(f"the seed must be at least 0 (got {seed})")
    bits = np.array(seed % (1 << 64), np.uint64)
    with np.errstate(over="ignore"):  # all arithmetic is modulo 2^64
        for counter in counters:
            index = np.asarray(counter).astype(np.uint64)
            bits = _mix(bits + (index + np.uint64(1)) * _GOLDEN_GAMMA)
    return bits


def to_unit_interval(bits: np.ndarray) -> np.ndarray:
    """Convert uint64 random bits to float64 values in [0, 1) with 53 random bits. The shape is unchanged."""
    return (bits >> np.uint64(11)) * (1.0 / (1 << 53))


def shuffle_rows(values: np.ndarray, counts: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Shuffle the first `counts[n]` values of each row n. The remaining values keep their positions.

    Args:
        values: Array of shape (N, M).
        counts: Number of values to shuffle in each row, of shape (N,).
        bits: Random sort keys, a uint64 array of shape (N, M).
    """
    is_used = np.arange(values.shape[1]) < counts[:, None]
    keys = np.where(is_used, bits, np.uint64(0xFFFFFFFFFFFFFFFF))
    return np.take_along_axis(values, np.argsort(keys, axis=1, kind="stable"), axis=1)


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _MULTIPLIER_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MULTIPLIER_2
    return np.asarray(bits ^ (bits >> np.uint64(31)))
