"""Counter-based streams: known answers, one definition everywhere, uniform and independent."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from spec.random import Purpose, as_seeds, block_uniforms, philox, uniform, uniforms

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(words: tuple[int, ...], answer: tuple[int, ...]) -> None:
    """The vectors published with Random123."""
    assert philox(*words) == answer


def test_python_numpy_torch_and_numba_agree_bit_for_bit() -> None:
    seeds, positions = [0, 1, 2**63 + 5, 2**64 - 1, 123_456_789_012], [0, 5, 7, 2**31, 2**32 - 1]
    python = [uniform(seed, int(Purpose.DRAFT), position, 3) for seed, position in zip(seeds, positions, strict=True)]
    wrapped, at = as_seeds(seeds), np.array(positions)
    assert uniforms(seeds, Purpose.DRAFT, positions, 3).tolist() == python
    assert uniform(wrapped, int(Purpose.DRAFT), at, 3).tolist() == python
    assert uniform(torch.from_numpy(wrapped), int(Purpose.DRAFT), torch.from_numpy(at), 3).tolist() == python


def test_a_block_takes_each_draw_from_its_own_stream() -> None:
    noise = block_uniforms([11, 12, 13], [4, 9, 2], [2, 0, 1], [6, 7, 8])
    accept = [uniform(11, 2, 4, 6), uniform(11, 2, 5, 6), uniform(13, 2, 2, 8)]
    last = [
        uniform(11, 3, 4),
        uniform(11, 3, 5),
        uniform(11, 4, 6),
        uniform(12, 5, 9),
        uniform(13, 3, 2),
        uniform(13, 4, 3),
    ]
    assert noise.accept.tolist() == accept
    assert noise.last.tolist() == last
    assert noise.last[3] == uniforms([12], Purpose.TARGET, [9])[0]  # no draft: plain decoding's own draw


def stream(**changed: int) -> np.ndarray:
    """4,096 draws along one axis of the key, the others fixed."""
    key: dict[str, int | np.ndarray] = {"seed": 5, "purpose": 1, "position": 0, "round": 0}
    (axis,) = changed
    key[axis] = np.arange(4096) + changed[axis]
    return uniform(*(np.asarray(value, dtype=np.int64) for value in key.values()))


@pytest.mark.parametrize("axis", ("seed", "position", "round", "purpose"))
def test_uniform_along_every_axis(axis: str) -> None:
    """Kolmogorov-Smirnov below its 1e-4 quantile, and no correlation with the next draw."""
    draws = np.concatenate([stream(**{axis: start}) for start in range(0, 4096 * 16, 4096)])
    ordered, n = np.sort(draws), len(draws)
    distance = np.abs(ordered - (np.arange(n) + 0.5) / n).max() + 0.5 / n
    assert distance * np.sqrt(n) < 2.23
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) * np.sqrt(n) < 4
    assert (draws >= 0).all() and (draws < 1).all() and len(np.unique(draws)) == n


def test_purposes_seeds_and_rounds_are_independent() -> None:
    """Pairs of streams fill an 8 x 8 grid evenly: chi-square within 5 standard deviations."""
    positions = np.arange(64_000)
    keys = [(seed, purpose, step) for seed in (7, 8) for purpose in (1, 2, 3) for step in (0, 1)]
    streams = [np.floor(8 * uniform(seed, purpose, positions, step)).astype(int) for seed, purpose, step in keys]
    for first, second in itertools.combinations(streams, 2):
        counts = np.bincount(first * 8 + second, minlength=64)
        assert abs(((counts - 1000) ** 2 / 1000).sum() - 63) / np.sqrt(126) < 5


def test_mismatched_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one of each"):
        uniforms([1, 2], Purpose.DRAFT, [0])
    with pytest.raises(ValueError, match="one entry a request"):
        block_uniforms([1, 2], [0, 0], [1], [0, 0])
