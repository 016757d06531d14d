"""Numbers that are a function of what they are for."""

from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.captions.draws import CaptionDraw, choice, drawn_numbers, permutation

DRAW = CaptionDraw(seed=7, epoch=1, key="a/01")


def within_four_sigma(count, rate, num_draws):
    return abs(count - rate * num_draws) <= 4 * (rate * (1 - rate) * num_draws) ** 0.5


def test_the_numbers_are_pinned():
    # A run that is resumed with a later version has to see the same texts.
    assert drawn_numbers(DRAW, "l", "shuffle", 2) == [0.19612230629870353, 0.48685404992119097]


@pytest.mark.parametrize(
    "other",
    [
        (DRAW._replace(seed=8), "l", "shuffle"),
        (DRAW._replace(epoch=2), "l", "shuffle"),
        (DRAW._replace(key="a/02"), "l", "shuffle"),
        (DRAW._replace(occurrence=1), "l", "shuffle"),
        (DRAW, "g", "shuffle"),
        (DRAW, "both", "shuffle"),
        (DRAW, "l", "tag_dropout"),
    ],
)
def test_every_part_of_the_key_counts(other):
    assert not set(drawn_numbers(*other, 20)) & set(drawn_numbers(DRAW, "l", "shuffle", 20))


def test_the_step_does_not_count():
    assert drawn_numbers(DRAW._replace(step=5, max_train_steps=9), "l", "shuffle", 3) == drawn_numbers(
        DRAW, "l", "shuffle", 3
    )


def test_a_variant_is_the_same_at_every_visit_and_no_visit_of_training():
    visits = [DRAW._replace(epoch=epoch, occurrence=occurrence) for epoch in (1, 2) for occurrence in (0, 1)]
    assert len({visit.of_variant(1) for visit in visits}) == 1
    assert DRAW.of_variant(1) not in visits
    assert DRAW.of_variant(0) != DRAW.of_variant(1)


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(), max_size=8), st.integers(0, 40), st.integers(0, 40))
def test_any_key_will_do_and_more_numbers_begin_with_fewer(key, count, more):
    draw = DRAW._replace(key=key)
    numbers = drawn_numbers(draw, "g", "tag_dropout", count)
    assert len(numbers) == count
    assert all(0 <= number < 1 for number in numbers)
    assert drawn_numbers(draw, "g", "tag_dropout", count + more)[:count] == numbers


def test_numbers_are_uniform_and_independent_of_their_neighbours():
    num_draws = 100_000
    numbers = drawn_numbers(DRAW, "l", "tag_dropout", num_draws)
    counts = Counter(choice(number, 10) for number in numbers)
    assert all(within_four_sigma(counts[index], 0.1, num_draws) for index in range(10))
    rising = sum(first < second for first, second in zip(numbers[::2], numbers[1::2], strict=True))
    assert within_four_sigma(rising, 0.5, num_draws / 2)


def test_every_order_is_equally_likely():
    num_draws = 60_000
    counts = Counter(
        tuple(permutation(drawn_numbers(DRAW._replace(occurrence=occurrence), "l", "shuffle", 3)))
        for occurrence in range(num_draws)
    )
    assert set(counts) == set(permutations(range(3)))
    assert all(within_four_sigma(count, 1 / 6, num_draws) for count in counts.values())
