import json
import socket
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from sdn.captions import new_encoder, save_encoder
from sdn.config import (
    CaptionConfig,
    DataConfig,
    RunConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.records import Record
from sdn.data.shards import Writing, write_dataset
from sdn.data.sources import Given
from sdn.ranks import Rank, of_process_group
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER, StageInputs, new_student, run_stage
from sdn.teacher import empty_teacher, save_teacher

WORLD, TIMEOUT_S = 2, 90
# Samples an epoch at a global batch of 4: three full batches; 4, 4, 3; 4, 4, 1, where the second
# rank has nothing to read in the last.
SAMPLES = (12, 11, 9)
CASES = [(stage, count) for stage in ("stage_one", "stage_two") for count in SAMPLES]

STAGE = StageConfig(
    epochs=1,
    global_batch=4,
    rate=1e-3,
    scale="relative",
    average_share=0.5,
    precision="float32",
)
CONFIG = RunConfig(
    name="gradients",
    data=DataConfig(source="test", resolution=32, shard_samples=5),
    teacher=TeacherConfig(arch="vgg11", width=0.07, convention="symmetric"),
    # The mean alone of an encoder that was never fitted hardly tells captions apart, and critics
    # then err on all alike.
    captions=CaptionConfig(dim=12, width=8, max_chars=32, loudest=True),
    student=StudentConfig(init="he"),
    stage_one=STAGE,
    stage_two=STAGE,
    lanes=4,
    workers=WORLD,
)


def write_inputs(folder):
    """A data set of each size, a teacher and a caption encoder, both of random weights."""
    for count in SAMPLES:
        items = [
            Record(
                key=f"item-{n}",
                image=encode(
                    np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8), "png"
                ),
                captions=(f"picture {n}", f"the {n}th"),
                split="train",
            )
            for n in range(count)
        ]
        files = LocalFolder(folder / f"data-{count}")
        write_dataset([Given(tuple(items))], files, Writing(config=CONFIG.data))
    torch.manual_seed(0)
    teacher = empty_teacher(CONFIG.teacher)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    save_teacher(teacher, folder / TEACHER)
    taps = teacher(torch.rand(8, 3, 32, 32) * 2 - 1)
    means = {name: float(tap.abs().mean()) for name, tap in taps.items()}
    (folder / TAP_MEANS).write_text(json.dumps(means))
    save_encoder(new_encoder(CONFIG.captions), folder / ENCODER)


def train_all(folder):
    """Every case on one rank: its last checkpoint and the keys that it read in each step."""
    found = {}
    for stage, count in CASES:
        read, saved = defaultdict(list), []
        trainer = run_stage(
            stage,
            CONFIG,
            StageInputs(data=folder / f"data-{count}", teacher=folder, captions=folder),
            save=lambda trainer, saved=saved: saved.append(trainer.step),
            report=lambda step: None,
            rank=of_process_group(torch.device("cpu")),
            consumed=lambda batch, read=read: read[batch.step].extend(batch.keys),
        )
        state = trainer.checkpoint()
        found[stage, count] = {
            "step": state.step,
            "images_seen": state.images_seen,
            "saved": saved,
            "read": dict(read),
            "weights": state.model,
            "average": state.average,
            "moments": {n: s["exp_avg"] for n, s in state.optimizer["state"].items()},
        }
    return found


def run_rank(rank, folder, port):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    torch.save(train_all(folder), folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training on one rank and on two: [the one], [the first, the second]."""
    folder = tmp_path_factory.mktemp("gradients")
    write_inputs(folder)
    context = multiprocessing.spawn(run_rank, args=(folder, free_port()), nprocs=WORLD, join=False)
    until = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < until, f"the ranks were not done after {TIMEOUT_S} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train_all(folder)
    finally:
        torch.set_num_threads(threads)
    both = [torch.load(folder / f"rank-{r}.pt", weights_only=False) for r in range(WORLD)]
    return alone, both


def equal(found, expected):
    """The student is equal to 3e-5 of its size, and each tensor's way to 5e-3 of its length.

    In norms, not element by element: Adam divides by the gradient's size, so where that is next to
    nothing, rounding grows to a part of a step.
    """
    before = new_student(CONFIG).state_dict()
    assert found.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        away, way = (found[name] - tensor).norm(), (tensor - before[name]).norm()
        assert away <= 5e-3 * way, name
    whole = [torch.cat([state[name].flatten() for name in before]) for state in (found, expected)]
    assert (whole[0] - whole[1]).norm() <= 3e-5 * whole[1].norm()


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("stage", "count"), CASES)
def test_two_ranks_train_what_one_trains(runs, stage, count):
    """After an epoch, uneven in its last batch too, two ranks hold the weights of one rank."""
    alone, both = runs
    expected = alone[stage, count]
    for found in (rank[stage, count] for rank in both):
        assert found["step"] == expected["step"] == 3
        assert found["images_seen"] == expected["images_seen"] == count
        equal(found["weights"], expected["weights"])
        equal(found["average"], expected["average"])


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("stage", "count"), CASES)
def test_gradients_are_those_of_the_global_batch(runs, stage, count):
    """Adam's moving mean of the gradients, which is linear in each of them, is equal too."""
    alone, both = runs
    for rank in both:
        found, expected = rank[stage, count]["moments"], alone[stage, count]["moments"]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # Rounding turns the sign of an L1 term here and there, hence the norm.
            assert (found[name] - tensor).norm() <= 3e-3 * tensor.norm(), name


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("stage", "count"), CASES)
def test_ranks_stay_alike(runs, stage, count):
    """Both ranks hold the same bits and save at the same steps."""
    _, (one, other) = runs
    for part in ("weights", "average", "moments"):
        for name, tensor in one[stage, count][part].items():
            assert torch.equal(tensor, other[stage, count][part][name])
    assert one[stage, count]["saved"] == other[stage, count]["saved"]
    assert one[stage, count]["saved"][-1] == 3


@pytest.mark.timeout(150)
@pytest.mark.parametrize("count", SAMPLES)
def test_ranks_share_each_batch(runs, count):
    """In each step the ranks read what one rank reads, each sample once in the epoch."""
    alone, both = runs
    expected = alone["stage_one", count]["read"]
    parts = [rank["stage_one", count]["read"] for rank in both]
    for step in range(3):
        together = sorted(key for part in parts for key in part.get(step, ()))
        assert together == sorted(expected[step])
    everything = [key for keys in expected.values() for key in keys]
    assert sorted(everything) == sorted(f"item-{n}" for n in range(count))
    if count == 9:
        assert [len(part.get(2, ())) for part in parts] == [1, 0]


@pytest.mark.timeout(150)
def test_training_moved_the_weights(runs):
    """The equalities above are not those of weights that nothing has changed."""
    alone, _ = runs
    one, two = alone["stage_one", 12]["weights"], alone["stage_two", 12]["weights"]
    assert all(not torch.equal(one[name], two[name]) for name in one)


def test_impossible_number_of_ranks(tmp_path):
    """Ranks that cannot share the batch evenly are refused with the numbers that can."""
    write_inputs(tmp_path)
    with pytest.raises(ValueError, match=r"3 ranks cannot share 4 lanes.*possible: 1, 2, 4"):
        run_stage(
            "stage_one",
            CONFIG,
            StageInputs(data=tmp_path / "data-12", teacher=tmp_path, captions=tmp_path),
            save=lambda trainer: None,
            report=lambda step: None,
            rank=Rank(rank=0, world=3),
        )
