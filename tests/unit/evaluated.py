"""A tiny evaluation: data, a narrow teacher, reference and judge in folders of their own."""

from __future__ import annotations

import json

import tiny_data
import torch

from sdn.captions import new_encoder, save_encoder
from sdn.config import (
    CaptionConfig,
    EvaluationConfig,
    JudgeConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from sdn.data.dataset import open_dataset
from sdn.draws import plan_draws
from sdn.evaluation import open_evaluator
from sdn.features.networks import open_network
from sdn.reference import open_reference, write_judge, write_reference
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER, StageInputs
from sdn.teacher import empty_teacher, save_teacher

JUDGE_CONFIG = JudgeConfig(dim=16, epochs=2, batch=8)


def config_of(evaluation=None, **changes):
    """A run of the least size that is scored in the teacher's features: no packaged network."""
    settings = {"features": "teacher", "judge": JUDGE_CONFIG} | (evaluation or {})
    return RunConfig(
        name="tiny",
        data=tiny_data.CONFIG,
        teacher=TeacherConfig(arch="vgg11", width=0.05, convention="symmetric"),
        captions=CaptionConfig(dim=8, width=8, max_chars=40),
        student=StudentConfig(init="he"),
        evaluation=EvaluationConfig(**settings),
        **changes,
    )


def make_inputs(folder, records):
    """Data, teacher and captions of a run in folders of their own."""
    config = config_of()
    found = StageInputs(
        data=folder / "data", teacher=folder / "teacher", captions=folder / "captions"
    )
    for path in (found.data, found.teacher, found.captions):
        path.mkdir(parents=True)
    tiny_data.write(found.data, records)
    torch.manual_seed(0)
    teacher = empty_teacher(config.teacher)
    for conv in teacher.convs.values():
        torch.nn.init.normal_(conv.weight, 0, (2 / conv.weight[0].numel()) ** 0.5)
    save_teacher(teacher, found.teacher / TEACHER)
    (found.teacher / TAP_MEANS).write_text(json.dumps(dict.fromkeys(teacher.names, 1.0)))
    save_encoder(new_encoder(config.captions), found.captions / ENCODER)
    return found


def make_places(folder, inputs, config):
    """The folders of reference and judge, written."""
    network = open_network(config.evaluation, inputs.teacher)
    places = {"reference": folder / "reference", "judge": folder / "judge"}
    for place in places.values():
        place.mkdir(parents=True)
    write_reference(places["reference"], inputs.data, network, config.evaluation)
    real = open_reference(places["reference"])
    write_judge(places["judge"], inputs.data, real, config.evaluation.judge)
    return places


def make_evaluator(folder, inputs, config, places=None):
    """An evaluator of a run whose folders lie below `folder`."""
    places = places or make_places(folder, inputs, config)
    dataset = open_dataset(inputs.data)
    draws = plan_draws(dataset, config.evaluation)
    network = open_network(config.evaluation, inputs.teacher)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return open_evaluator(config.evaluation, dataset, draws, network, places, work)
