"""One, two and four ranks with the same global batch and seed follow the same losses."""

import dataclasses
import time

import numpy as np
import pytest
import test_gradients as base
import torch
from torch import distributed, multiprocessing

from sdn.config import AdversarialConfig, CaptionConfig, StudentConfig, TeacherConfig
from sdn.data.files import LocalFolder
from sdn.data.images import encode
from sdn.data.records import Record
from sdn.data.shards import Writing, write_dataset
from sdn.data.sources import Given
from sdn.fitting import open_caption_fit, open_teacher_fit
from sdn.ranks import of_process_group
from sdn.stage_run import StageInputs, run_stage
from sdn.training import train

WORLDS = (1, 2, 4)
STEPS = 20
TIMEOUT_S = 150
STAGE = dataclasses.replace(base.STAGE, epochs=3, global_batch=6, rate=1e-4, average_share=0.0)
TEACHER = TeacherConfig(
    arch="vgg11", width=0.07, convention="symmetric", epochs=5, batch=10, rate=1e-3
)
CAPTIONS = CaptionConfig(
    dim=12, width=8, max_chars=32, epochs=5, batch=10, rate=1e-3, loudest=True, siblings=8
)
CASES = {
    "stage one": ("stage_one", {}),
    "stage two": ("stage_two", {}),
    "in parts": ("stage_two", {"accumulate": 2}),
    "clipped": ("stage_one", {"clip": 0.5}),
    "warm-up": ("stage_one", {"schedule": "warm-up", "warmup_share": 0.3}),
}
THIRD = AdversarialConfig(
    epochs=3,
    global_batch=6,
    rate=1e-4,
    precision="float32",
    critics={"pool2": 1.0, "pool5": 1.0},
    critic_width=8,
    critic_rate=1e-4,
)
ADVERSARIAL = {
    "stage three": {},
    "stage three, all terms": {"diversity": 0.1, "augment": "differentiable"},
}
# Rounding turns the sign of an L1 term here and there, hence the norm's tolerance; and a critic's
# bias, whose gradient is next to nothing while it errs on all images, moves by its sign: all
# judgements are shifted alike, which no gradient knows of. Which captions critics see is compared
# exactly in `test_adversarial.py`.
LOOSE = dict.fromkeys(ADVERSARIAL, ("norm", "loss/critics", "loss/adversary", "loss/total"))
FITS = ("teacher", "joint-embedding", "contrastive")


def write_data(folder):
    """43 images with labels, some without; batches of 6 end with one of a single image."""
    items = []
    for n in range(43):
        pixels = np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        items.append(
            Record(
                key=f"item-{n}",
                image=encode(pixels, "png"),
                captions=(f"picture {n}", f"the {n}th"),
                split="train",
                labels={"third": str(n % 3)} | ({"half": str(n % 2)} if n % 5 else {}),
            )
        )
    write_dataset([Given(tuple(items))], LocalFolder(folder), Writing(config=base.CONFIG.data))


def losses(folder):
    """Case -> loss terms of the first steps, on this process's rank of however many."""
    rank, found = of_process_group(torch.device("cpu")), {}
    inputs = StageInputs(data=folder / "data", teacher=folder, captions=folder)
    configs = {}
    for case, (name, changes) in CASES.items():
        stage = dataclasses.replace(STAGE, **changes)
        configs[case] = (
            name,
            dataclasses.replace(base.CONFIG, stage_one=stage, stage_two=stage, workers=1),
        )
    for case, changes in ADVERSARIAL.items():
        configs[case] = (
            "stage_three",
            dataclasses.replace(
                base.CONFIG,
                stage_three=dataclasses.replace(THIRD, **changes),
                student=StudentConfig(init="he", noise=4),
                workers=1,
            ),
        )
    for case, (name, config) in configs.items():
        reports = []
        run_stage(name, config, inputs, report=reports.append, rank=rank, report_every=1)
        found[case] = [step.losses | {"norm": step.gradient_norm} for step in reports[:STEPS]]
    for fit in FITS:
        if fit == "teacher":
            work = open_teacher_fit(TEACHER, folder / "data", None, rank)
            work.trainee.precision = "float32"
        else:
            config = dataclasses.replace(CAPTIONS, loss=fit)
            work = open_caption_fit(config, folder / "data", folder, None, rank)
        reports = []
        train(
            work.trainee,
            work.batches,
            work.advance,
            save_every=10**6,
            save=lambda: None,
            report=reports.append,
            report_every=1,
            rank=rank,
        )
        found[fit] = [step.losses | {"norm": step.gradient_norm} for step in reports[:STEPS]]
    return found


def run_rank(rank, world, folder, port):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    torch.save(losses(folder), folder / f"losses-{world}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """World size -> losses of each of its ranks."""
    folder = tmp_path_factory.mktemp("worlds")
    base.write_inputs(folder)
    write_data(folder / "data")
    for world in WORLDS:
        arguments = (world, folder, base.free_port())
        context = multiprocessing.spawn(run_rank, args=arguments, nprocs=world, join=False)
        until = time.monotonic() + TIMEOUT_S
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < until, f"{world} ranks not done after {TIMEOUT_S} s"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    return {
        world: [torch.load(folder / f"losses-{world}-{rank}.pt") for rank in range(world)]
        for world in WORLDS
    }


@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("case", [*CASES, *ADVERSARIAL, *FITS])
def test_losses_do_not_depend_on_the_number_of_ranks(found, case, world):
    """In float32 every term of the first 20 steps is that of one rank to 1e-4, on every rank.

    So the caption loss meets the images of all ranks, and batch norm is that of the whole batch.
    """
    expected = found[1][0][case]
    assert len(expected) == STEPS
    for rank in found[world]:
        for step, (one, other) in enumerate(zip(expected, rank[case], strict=True)):
            for name, value in one.items():
                near = 1e-2 if name in LOOSE.get(case, ("norm",)) else 1e-4
                assert other[name] == pytest.approx(value, rel=near), (step, name)


@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.parametrize("case", [*CASES, *ADVERSARIAL, *FITS])
def test_the_losses_move(found, case):
    """What is compared above is not a training that stands still."""
    totals = [step["loss/total"] for step in found[1][0][case]]
    assert len(set(totals)) == STEPS


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_parts_and_clipping_do_what_they_say(found):
    """A batch in two parts has the losses of the whole; a clipped one goes another way."""
    whole, parts, clipped, plain = (
        found[1][0][case] for case in ("stage two", "in parts", "clipped", "stage one")
    )
    for one, other in zip(whole, parts, strict=True):
        assert other["loss/total"] == pytest.approx(one["loss/total"], rel=1e-4)
    assert max(step["norm"] for step in plain) > 0.5
    assert clipped[0]["norm"] == pytest.approx(plain[0]["norm"], rel=1e-5)
    assert clipped[-1]["loss/total"] != pytest.approx(plain[-1]["loss/total"], rel=1e-5)
