"""Random numbers of many generators, compared with those of NumPy's generators."""

import numpy as np
import pytest

from llm2clip.data.random_streams import RandomStreams, draw_epoch_permutation


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32, 2**63 + 5, 2**100 + 3])
def test_streams_equal_the_generators_of_numpy(seed: int) -> None:
    """Permutations and numbers are drawn in turn, because a permutation may leave half of the last output unused."""
    first, second = np.array([0, 0, 1, 5, 2**32 - 1]), np.array([0, 9, 0, 3_000_000, 2**31])
    streams = RandomStreams(seed, first, second)
    generators = [np.random.default_rng([seed, int(a), int(b)]) for a, b in zip(first, second, strict=True)]
    for turn in range(6):
        counts = np.array([0, 1, 2, 9, 40])[[(n + turn) % 5 for n in range(5)]]
        values = np.tile(np.arange(40) * 3, (5, 1))
        expected = [
            generator.permutation(row[:n]) for generator, row, n in zip(generators, values, counts, strict=True)
        ]
        streams.shuffle(values, counts)
        assert [row[:n].tolist() for row, n in zip(values, counts, strict=True)] == [row.tolist() for row in expected]
        if turn % 2:
            assert streams.random().tolist() == [generator.random() for generator in generators]


def test_negative_seeds_are_rejected() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        RandomStreams(-1, np.array([1]))


def test_epoch_permutation_depends_on_the_epoch_only() -> None:
    first = draw_epoch_permutation(9, 0, 1).tolist()
    assert sorted(first) == list(range(9))
    assert draw_epoch_permutation(9, 0, 1).tolist() == first
    assert draw_epoch_permutation(9, 0, 2).tolist() != first
