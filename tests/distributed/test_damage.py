"""Training on damaged shards: each sample as it was, or none at all."""

import random
import shutil

import pytest
import torch
from test_gradients import CONFIG, write_inputs

from sdn.data.reading import DamagedSample
from sdn.stage_run import StageInputs, run_stage


def train(inputs, data):
    """Keys read and final weights of one epoch of stage one, on one rank."""
    read = []
    trainer = run_stage(
        "stage_one",
        CONFIG,
        StageInputs(data=data, teacher=inputs, captions=inputs),
        save=lambda trainer: None,
        report=lambda step: None,
        consumed=lambda batch: read.extend(batch.keys),
    )
    return read, trainer.weights()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def test_training_stops_at_random_damage_and_never_learns_from_it(inputs, tmp_path):
    """Bytes of real shards and indexes are changed, removed, doubled: training names the shard."""
    expected, weights = train(inputs, inputs / "data-12")
    draw = random.Random(3)
    missed = 0
    for number in range(24):
        data = shutil.copytree(inputs / "data-12", tmp_path / str(number))
        path = data / draw.choice(sorted(found.name for found in data.glob("train-*")))
        path.write_bytes(damaged(path.read_bytes(), number % 4, draw))
        try:
            read, found = train(inputs, data)
        except DamagedSample as error:
            named = error.shard
        else:  # the damage lies in the padding behind the last sample
            named = f"{path.stem}.tar"
            missed += 1
            assert read == expected
            assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert named == f"{path.stem}.tar"
    assert missed <= 6


def damaged(content, kind, draw):
    """The bytes with a bit flipped, a block removed, a block doubled, or the end cut off."""
    start = draw.randrange(int(0.6 * len(content)))
    before, after = content[:start], content[start:]
    return (
        before + bytes([after[0] ^ (1 << draw.randrange(8))]) + after[1:],
        before + after[512:],
        before + after[:512] + after,
        before,
    )[kind]
