from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diffusion.core.samples import Batch, Prepared
from lora_diffusion.data.batches import Batches


def _collate(items):
    assert len({item.group for item in items}) == 1
    numbers = torch.tensor([item.tensors["number"] for item in items])
    return Batch(tuple(item.key for item in items), {"number": numbers})


@st.composite
def _plans(draw):
    repeats = draw(st.lists(st.integers(1, 4), min_size=1, max_size=9))
    groups = draw(st.lists(st.sampled_from("xyz"), min_size=len(repeats), max_size=len(repeats)))
    items = [
        Prepared(str(index), {"number": index}, group, times)
        for index, (group, times) in enumerate(zip(groups, repeats, strict=True))
    ]
    sizes = {"batch_size": draw(st.integers(1, 5)), "gradient_accumulation": draw(st.integers(1, 4))}
    return items, {**sizes, "seed": draw(st.integers(0, 5))}


def _signature(step):
    return [(batch.keys, batch.position) for batch in step]


@settings(max_examples=60, deadline=None)
@given(_plans())
def test_each_item_appears_as_often_as_its_repeats_in_every_epoch(plan):
    items, options = plan
    batches = Batches(items, _collate, **options)
    assert batches.num_samples_per_epoch == sum(item.num_repeats for item in items)
    steps = islice(batches.steps(0), 2 * batches.num_steps_per_epoch)
    for epoch in range(2):
        counts: Counter[str] = Counter()
        positions = []
        for step in islice(steps, batches.num_steps_per_epoch):
            assert 1 <= len(step) <= options["gradient_accumulation"]
            for batch in step:
                assert 1 <= len(batch) <= options["batch_size"]
                assert batch.position[0] == epoch
                positions.append(batch.position[1])
                counts.update(batch.keys)
        assert counts == {item.key: item.num_repeats for item in items}
        assert positions == list(range(len(positions)))


@settings(max_examples=60, deadline=None)
@given(_plans(), st.integers(0, 40))
def test_steps_from_n_are_those_from_zero_after_n(plan, start):
    items, options = plan
    expected = [_signature(step) for step in islice(Batches(items, _collate, **options).steps(0), start, start + 6)]
    assert [_signature(step) for step in islice(Batches(items, _collate, **options).steps(start), 6)] == expected


@settings(max_examples=60, deadline=None)
@given(_plans(), st.integers(2, 4))
def test_processes_share_an_epoch_in_equal_parts(plan, num_processes):
    items, options = plan
    parts = [
        Batches(items, _collate, **options, process_index=index, num_processes=num_processes)
        for index in range(num_processes)
    ]
    num_steps = parts[0].num_steps_per_epoch
    counts: Counter[str] = Counter()
    positions = []
    for steps in zip(*(islice(part.steps(0), num_steps) for part in parts), strict=True):
        assert len({len(step) for step in steps}) == 1 and steps[0]
        for batch in (batch for step in steps for batch in step):
            counts.update(batch.keys)
            positions.append(batch.position)
    assert len(set(positions)) == len(positions)
    alone = Batches(items, _collate, **options | {"gradient_accumulation": 1})
    assert len(positions) - alone.num_steps_per_epoch in range(num_processes)
    assert all(counts[item.key] >= item.num_repeats for item in items)


def test_two_processes_make_the_steps_of_one_with_twice_the_accumulation():
    items = [Prepared(str(index), {"number": index}, "x", 2) for index in range(8)]
    one = Batches(items, _collate, batch_size=2, gradient_accumulation=4, seed=1)
    two = [
        Batches(items, _collate, batch_size=2, gradient_accumulation=2, seed=1, process_index=index, num_processes=2)
        for index in range(2)
    ]
    for step, first, second in islice(zip(one.steps(0), two[0].steps(0), two[1].steps(0), strict=False), 5):
        assert sorted(_signature(step)) == sorted(_signature(first) + _signature(second))


def test_order_changes_with_epoch_and_seed():
    items = [Prepared(str(index), {"number": index}, "x") for index in range(20)]
    orders = set()
    for seed in (0, 1):
        steps = Batches(items, _collate, batch_size=1, gradient_accumulation=20, seed=seed).steps(0)
        orders |= {tuple(batch.keys for batch in step) for step in islice(steps, 2)}
    assert len(orders) == 4


class _Untouchable(Mapping):
    def __getitem__(self, name):
        raise AssertionError("read")

    __iter__ = __len__ = __getitem__


def test_skipped_items_are_not_read():
    items = [Prepared(str(index), _Untouchable(), "x") for index in range(20)]
    read = []

    def collate(chosen):
        read.extend(chosen)
        return Batch(tuple(item.key for item in chosen), {})

    batches = Batches(items, collate, batch_size=1, gradient_accumulation=1, seed=0)
    next(batches.steps(10**9))
    assert len(read) == 1


def test_nothing_to_show_is_refused():
    with pytest.raises(ValueError, match="needs items"):
        Batches([], _collate, batch_size=1, gradient_accumulation=1, seed=0)
