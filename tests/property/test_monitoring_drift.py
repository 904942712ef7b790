"""PSI and KS against plain references and SciPy; intervals of labels against looking them up one by one.

Mutants tried, each made a test here fail: empty bins left out; bins closed below instead of above; KS over one side of
each step only; a value that holds several deciles in one bin with what lies below it; an edge counted to the bin below
it whole; label shares not used in `mixed`; the first of two overlapping intervals wins.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from lake.monitoring.accuracy import disjoint
from lake.monitoring.drift import BINS, Mixture, _deciles, compare, ks_noise, psi_noise, psi_of
from lake.monitoring.reference import QUANTILES, decode_reference, encode_reference, make_reference, mixed

SEEDS = st.integers(0, 2**32 - 1)


def plain_psi(sample, reference_sample, edges) -> float:
    """By the book: shares of each bin, one value after the other."""
    bounds = [-math.inf, *edges, math.inf]
    total = 0.0
    floor = 0.5 / len(sample)
    for low, high in itertools.pairwise(bounds):
        found = sum(low < value <= high for value in sample) / len(sample)
        wanted = sum(low < value <= high for value in reference_sample) / len(reference_sample)
        if found or wanted:
            found, wanted = max(found, floor), max(wanted, floor)
            total += (found - wanted) * math.log(found / wanted)
    return total


@given(
    sample=st.lists(st.integers(-20, 20), min_size=1, max_size=60),
    reference=st.lists(st.integers(-20, 20), min_size=1, max_size=60),
)
def test_psi_is_that_of_the_book(sample, reference):
    edges = np.quantile(reference, np.arange(1, BINS) / BINS)
    expected = np.diff(np.searchsorted(np.sort(reference), edges, side="right"), prepend=0, append=len(reference))
    found = psi_of(np.sort(np.array(sample, float)), edges, expected / len(reference))
    assert found == pytest.approx(plain_psi(sample, reference, edges))


@given(
    seed=SEEDS,
    count=st.integers(100, 400),
    shift=st.floats(-1.5, 1.5),
    draw=st.sampled_from(["normal", "exponential", "uniform"]),
)
@settings(max_examples=40)
def test_psi_against_101_quantiles_is_that_of_the_book_against_the_whole_sample(seed, count, shift, draw):
    rng = np.random.default_rng(seed)
    training = getattr(rng, draw)(size=5_000)
    sample = getattr(rng, draw)(size=count) + shift
    found = compare(mixed(make_reference(training[:, None], training)), np.column_stack([sample, sample]))
    edges = np.quantile(training, np.arange(1, BINS) / BINS)
    # numpy's own histogram, and not a line of ours.
    actual, wanted = (
        np.histogram(np.clip(values, training.min(), training.max()), [training.min(), *edges, training.max()])[0]
        for values in (sample, training)
    )
    floor = 0.5 / count
    actual, wanted = np.maximum(actual / count, floor), wanted / len(training)
    assert found.psi[0] == pytest.approx(np.sum((actual - wanted) * np.log(actual / wanted)), rel=0.02, abs=0.01)


def test_the_bins_of_a_continuous_reference_hold_a_tenth_each():
    training = np.random.default_rng(4).normal(size=20_000)
    _, expected = _deciles(mixed(make_reference(training[:, None], training)))
    assert expected == pytest.approx(np.full((2, BINS), 0.1), abs=1e-9)


@given(seed=SEEDS, count=st.integers(20, 400), shift=st.floats(-2, 2))
@settings(max_examples=30)
def test_ks_against_101_quantiles_is_that_of_scipy_against_the_whole_sample(seed, count, shift):
    rng = np.random.default_rng(seed)
    training = rng.normal(size=(5_000, 1)).astype(np.float32)
    sample = (rng.normal(size=count) + shift).astype(np.float32)
    reference = make_reference(training, training[:, 0])
    found = compare(mixed(reference), np.column_stack([sample, sample]))
    # A hundredth of the reference lies between two quantiles; a line through it is off by much less.
    assert found.ks[0] == pytest.approx(ks_2samp(training[:, 0], sample).statistic, abs=0.01)
    assert found.ks[0] == found.ks[1]


@given(seed=SEEDS, count=st.sampled_from([30, 100, 300]))
@settings(max_examples=40)
def test_equal_distributions_stay_below_what_chance_gives(seed, count):
    rng = np.random.default_rng(seed)
    training = rng.exponential(size=(2_000, 3)).astype(np.float32)
    sample = rng.exponential(size=(count, 4)).astype(np.float32)
    found = compare(mixed(make_reference(training, training[:, 0])), sample)
    # One in a thousand may be above; three features of forty samples give 0.1 on average. Twice the bound: none.
    assert (found.psi < 2 * psi_noise(count, 2_000)).all()
    assert (found.ks < 1.3 * ks_noise(count, 2_000)).all()


def test_the_noise_bounds_are_exceeded_once_in_a_thousand():
    rng = np.random.default_rng(3)
    features, count, training = 400, 200, 4_000
    reference = make_reference(rng.normal(size=(training, features)), rng.normal(size=training))
    above_psi = above_ks = 0
    for _ in range(10):
        found = compare(mixed(reference), rng.normal(size=(count, features + 1)))
        above_psi += int((found.psi > psi_noise(count, training)).sum())
        above_ks += int((found.ks > ks_noise(count, training)).sum())
    assert above_psi <= 12 and above_ks <= 12


def test_a_value_that_never_moves_has_not_drifted_and_any_other_value_has():
    training = np.full((500, 1), 3.0, np.float32)
    reference = make_reference(training, training[:, 0])
    same = compare(mixed(reference), np.full((50, 2), 3.0))
    assert same.psi.tolist() == [0.0, 0.0] and same.ks.tolist() == [0.0, 0.0]
    moved = compare(mixed(reference), np.full((50, 2), 3.5))
    assert moved.psi[0] > 4 and moved.ks[0] == 1.0


@pytest.mark.parametrize("value", [0.0, 3.0, -2e-30, 1e6])
@pytest.mark.parametrize("direction", [-1, 1])
def test_a_value_that_never_moved_is_seen_to_move_down_as_well_as_up(value, direction):
    reference = make_reference(np.full((500, 1), value), np.full(500, value))
    moved = compare(mixed(reference), np.full((50, 2), value + direction * max(abs(value), 1e-3) / 2))
    assert moved.psi[0] > 4 and moved.ks[0] == 1.0


def test_scores_that_fall_from_one_a_little_have_drifted_and_those_that_stay_have_not():
    rng = np.random.default_rng(6)

    def scores(count):
        return np.where(rng.random(count) < 0.9, 1.0, rng.uniform(0.5, 0.96, count))

    training = scores(4_000)
    reference = mixed(make_reference(training[:, None], training))
    same = np.column_stack([scores(200)] * 2)
    assert compare(reference, same).psi[0] < psi_noise(200, 4_000)
    assert compare(reference, np.where(same == 1.0, 0.97, same)).psi[0] > 4
    # Another processor's last bits are no drift.
    assert compare(reference, np.where(same == 1.0, np.float32(1) - np.float32(6e-8), same)).psi[0] < 0.1


@pytest.mark.parametrize("shares", [[0.4, 0.6], [0.25, 0.25, 0.25, 0.25], [0.7, 0.3]])
def test_whole_numbers_are_compared_by_their_shares(shares):
    rng = np.random.default_rng(8)
    training = rng.choice(len(shares), 5_000, p=shares).astype(np.float64)
    reference = mixed(make_reference(training[:, None], training))
    same = rng.choice(len(shares), 300, p=shares).astype(np.float64)
    found = compare(reference, np.column_stack([same, same]))
    assert found.psi[0] < psi_noise(300, 5_000)
    actual, wanted = (np.bincount(values.astype(int)) / len(values) for values in (same, training))
    assert found.psi[0] == pytest.approx(np.sum((actual - wanted) * np.log(actual / wanted)), abs=0.01)
    between = compare(reference, np.column_stack([same + 0.5] * 2))
    assert between.psi[0] > 1


def test_values_that_are_no_numbers_count_nowhere():
    training = np.arange(1_000, dtype=np.float32)[:, None]
    reference = make_reference(training, training[:, 0])
    sample = np.column_stack([np.arange(1_000.0), np.full(1_000, np.nan)])
    sample[::2, 0] = np.inf
    found = compare(mixed(reference), sample)
    assert found.counted.tolist() == [500, 0]
    assert found.psi[1] == 0.0 and found.psi[0] < psi_noise(500, 1_000)


def test_other_shares_of_labels_are_no_drift_but_their_values_are():
    rng = np.random.default_rng(5)
    labels = np.repeat(["run", "walk"], 1_000)
    training = (rng.normal(size=2_000) + np.where(labels == "run", 5, 0))[:, None]
    reference = make_reference(training, training[:, 0], labels)
    walks = rng.normal(size=(200, 1))
    only = np.column_stack([walks, walks])
    assert compare(mixed(reference), only).psi[0] > 0.5
    assert compare(mixed(reference, {"walk": 1.0}), only).psi[0] < psi_noise(200, 1_000)
    assert compare(mixed(reference, {"walk": 1.0}), only + 1).psi[0] > 0.5
    # A label that training never saw is compared with the whole.
    assert compare(mixed(reference, {"jump": 1.0}), only).psi == pytest.approx(compare(mixed(reference), only).psi)


@given(seed=SEEDS, share=st.floats(0.05, 0.95))
@settings(max_examples=25)
def test_a_mixture_is_the_distribution_of_windows_mixed_so(seed, share):
    rng = np.random.default_rng(seed)
    labels = np.repeat(["run", "walk"], 2_000)
    training = (rng.normal(size=4_000) + np.where(labels == "run", 4, 0))[:, None]
    found = mixed(make_reference(training, training[:, 0], labels), {"run": share, "walk": 1 - share})
    assert isinstance(found, Mixture)
    at = np.searchsorted(found.points[0], 2.0)
    # Half way between the two hills, two standard deviations from either: 2.3 % of each lie on the far side.
    assert found.above[0][at] == pytest.approx(0.977 * share + 0.023 * (1 - share), abs=0.03)
    assert (np.diff(found.points[0]) >= 0).all() and found.above[0][0] == pytest.approx(1.0)


def test_a_reference_survives_its_bytes_and_knows_how_groups_differ():
    rng = np.random.default_rng(1)
    groups = np.repeat(["a", "b", "c", "d"], 300)
    features = rng.normal(size=(1_200, 2)).astype(np.float32)
    features[:, 1] += np.repeat([0.0, 1.0, 2.0, 3.0], 300)
    reference = make_reference(features, features[:, 0], names=["alike", "own"], groups=groups)
    assert decode_reference(encode_reference(reference)) == reference
    assert reference.names == ("alike", "own", "score")
    assert reference.spreads[0] < 0.1 < 0.5 < reference.spreads[1]
    assert all(len(feature.quantiles) == QUANTILES for feature in reference.features)


Rows = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10), st.sampled_from(["a", "b", ""])), max_size=8)


@given(rows=Rows)
def test_joined_intervals_say_at_every_moment_what_the_one_that_began_last_says(rows):
    intervals = sorted(((start, start + length, label) for start, length, label in rows), key=lambda row: row[0])
    found = disjoint(intervals)
    for moment in range(45):
        holding = [label for start, end, label in intervals if start <= moment < end]
        assert found.over(np.array([moment]), np.array([moment])) == [holding[-1] if holding else ""]
    assert (found.starts_us[1:] >= found.ends_us[:-1]).all()
    touching = found.starts_us[1:] == found.ends_us[:-1]
    assert not any(
        one == other for one, other, close in zip(found.labels, found.labels[1:], touching, strict=False) if close
    )
