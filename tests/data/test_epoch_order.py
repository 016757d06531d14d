"""The order of an epoch: each picture once, one kind to a batch, equal shares, one mean over each step, resumable."""

from collections import Counter
from fractions import Fraction

import pytest

from library.data.epoch_order import BatchShape, EpochOrder

# 14 pictures of four buckets, mixed, one of which has a single picture.
KINDS = [("wide", "tall", "square", "wide", "wide")[index % 5] for index in range(13)] + ["alone"]
SHAPES = [
    pytest.param(
        (batch_size, accumulation_steps, num_processes), id=f"{batch_size}x{accumulation_steps}x{num_processes}"
    )
    for batch_size in range(1, 6)
    for accumulation_steps in range(1, 5)
    for num_processes in range(1, 4)
]


def orders(shape, kinds=KINDS, **options):
    """The order of each process."""
    batch_size, accumulation_steps, num_processes = shape
    return [
        EpochOrder(kinds, BatchShape(batch_size, accumulation_steps, num_processes, process), **{"seed": 7, **options})
        for process in range(num_processes)
    ]


def epoch_of(order, epoch=0, first_step=0):
    order.start_at(epoch, first_step, steps_done=first_step)
    return list(order)


def counted(micro_batches):
    """Those that take part in the gradients: spare ones fill up the last step at scale 0."""
    return [micro_batch for micro_batch in micro_batches if micro_batch.loss_scale]


def steps_of(micro_batches):
    """The micro-batches of one process, grouped by optimizer step."""
    steps = [[]]
    for micro_batch in micro_batches:
        steps[-1].append(micro_batch)
        if micro_batch.completes_step:
            steps.append([])
    assert steps.pop() == []  # the last one of an epoch completes its step
    return steps


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_shows_every_picture_exactly_once(shape):
    shown = Counter(index for order in orders(shape) for batch in counted(epoch_of(order)) for index in batch.indices)
    assert shown == Counter(range(len(KINDS)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_has_one_kind_and_only_the_last_of_a_kind_is_smaller(shape):
    sizes = {}
    for order in orders(shape):
        for batch in epoch_of(order):
            (kind,) = {KINDS[index] for index in batch.indices}
            if batch.loss_scale:
                sizes.setdefault(kind, []).append(len(batch.indices))
    for kind, count in Counter(KINDS).items():
        whole, rest = divmod(count, shape[0])
        assert sorted(sizes[kind]) == sorted([shape[0]] * whole + ([rest] if rest else []))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_processes_agree_on_how_many_micro_batches_each_step_has(shape):
    lengths = [[len(step) for step in steps_of(epoch_of(order))] for order in orders(shape)]
    assert all(each == lengths[0] for each in lengths)
    assert len(lengths[0]) == orders(shape)[0].steps_per_epoch
    assert all(length == shape[1] for length in lengths[0][:-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_of_a_step_averaged_over_processes_are_the_mean_over_its_pictures(shape):
    for parts in zip(*(steps_of(epoch_of(order)) for order in orders(shape)), strict=True):
        batches = [batch for part in parts for batch in part]
        weights = {batch.loss_scale for batch in counted(batches)}
        assert len(weights) == 1  # every picture counts alike
        total = sum(Fraction(batch.loss_scale) * len(batch.indices) / shape[2] for batch in batches)
        assert float(total) == pytest.approx(1, abs=1e-12)  # scales are float64, of at most 60 pictures
        assert all(batch.indices for batch in batches)  # a spare one still runs through the network


@pytest.mark.parametrize("shape", SHAPES)
def test_starting_in_the_middle_gives_exactly_the_rest(shape):
    for order in orders(shape, flip=True):
        steps = steps_of(epoch_of(order, epoch=3))
        for first_step in range(len(steps) + 1):
            rest = [batch for step in steps[first_step:] for batch in step]
            assert epoch_of(order, epoch=3, first_step=first_step) == rest
            assert len(order) == len(rest)


def test_an_epoch_after_a_resumed_one_is_whole_again():
    (order,) = orders((2, 2, 1))
    epoch_of(order, epoch=3, first_step=2)
    assert epoch_of(order, epoch=4) == epoch_of(orders((2, 2, 1))[0], epoch=4)


def test_the_order_depends_on_seed_and_epoch_alone():
    (order,), (again,), (other_seed,) = orders((2, 1, 1)), orders((2, 1, 1)), orders((2, 1, 1), seed=8)
    epochs = [epoch_of(order, epoch) for epoch in range(5)]
    assert [epoch_of(again, epoch) for epoch in reversed(range(5))] == epochs[::-1]
    different = {tuple(epoch) for epoch in epochs} | {tuple(epoch_of(other_seed, 0))}
    assert len(different) == 6


def test_pictures_are_shuffled_into_other_batches_and_kinds_among_each_other():
    (order,) = orders((4, 1, 1))
    epochs = [epoch_of(order, epoch) for epoch in range(5)]
    assert len({frozenset(frozenset(batch.indices) for batch in epoch) for epoch in epochs}) == 5
    assert len({tuple(KINDS[batch.indices[0]] for batch in epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 2)], ids=str)
def test_repeats_show_every_picture_so_often(shape):
    batches = [batch for order in orders(shape, num_repeats=3) for batch in counted(epoch_of(order))]
    assert Counter(index for batch in batches for index in batch.indices) == Counter(list(range(len(KINDS))) * 3)
    assert len(batches) == orders(shape, num_repeats=3)[0].num_batches


def test_about_half_is_mirrored_anew_each_epoch_and_reproducibly():
    (order,), (again,) = (orders((5, 1, 1), kinds=["square"] * 1000, flip=True) for _ in range(2))
    flips = [{index: flip for batch in epoch_of(order, epoch) for index, flip in pairs(batch)} for epoch in (0, 1)]
    # A fair coin thrown 1000 times deviates by 16; five deviations are 80.
    assert all(abs(sum(each.values()) - 500) < 80 for each in flips)
    assert abs(sum(flips[0][index] == flips[1][index] for index in range(1000)) - 500) < 80
    assert epoch_of(again, 1) == epoch_of(order, 1)


def pairs(batch):
    return zip(batch.indices, batch.flips, strict=True)


def test_nothing_is_mirrored_unless_asked_for():
    assert not any(flip for batch in epoch_of(orders((2, 1, 1))[0]) for flip in batch.flips)


def test_a_spare_micro_batch_repeats_pictures_of_its_own_step():
    # Five batches for three processes: one is left over in the second step.
    first, second, third = (steps_of(epoch_of(order))[-1][0] for order in orders((1, 1, 3), kinds=["square"] * 5))
    assert (first.loss_scale, second.loss_scale, third.loss_scale) == (1.5, 1.5, 0)
    assert third.indices == first.indices
