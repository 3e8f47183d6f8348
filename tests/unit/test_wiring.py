"""Choices that are made in one place and must arrive in another."""

import dataclasses
import json

import pytest
import tiny_data
import torch

import sdn.caption_fitting
import sdn.stage_run
from sdn.caption_fitting import fit_captions
from sdn.captions import new_encoder, save_encoder
from sdn.config import CaptionConfig, RunConfig, StageConfig, TeacherConfig
from sdn.ranks import Rank
from sdn.sampling import ENCODER
from sdn.stage_run import TAP_MEANS, TEACHER, Embedder, StageInputs, run_stage
from sdn.teacher import empty_teacher, save_teacher


@pytest.mark.parametrize("loss", ["joint-embedding", "contrastive"])
def test_captions_are_fitted_with_the_configured_loss(loss, monkeypatch):
    """Only the loss that the config names is computed."""
    used = []

    def watched(name, function):
        return lambda *values: used.append(name) or function(*values)

    losses = {name: watched(name, f) for name, f in sdn.caption_fitting.LOSSES.items()}
    monkeypatch.setattr(sdn.caption_fitting, "LOSSES", losses)
    config = CaptionConfig(dim=4, width=8, max_chars=20, epochs=2, batch=4, loss=loss)
    captions = [(f"thing {n}",) for n in range(8)]
    fit_captions(captions, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), config)
    assert set(used) == {loss}


def test_captions_do_not_depend_on_the_unit_of_the_features():
    """Features in another unit and from another zero give nearly the same encoder."""
    config = CaptionConfig(dim=4, width=8, max_chars=20, epochs=2, batch=4)
    captions = [(f"thing {n}",) for n in range(8)]
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    texts = [found[0] for found in captions]
    one = fit_captions(captions, features, config).encode(texts)
    two = fit_captions(captions, features * 64 + 32, config).encode(texts)
    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)


def test_embedder_forgets_when_it_holds_too_many():
    """It never remembers more than it may, and what it gives stays right."""
    calls = []

    def encode(captions):
        calls.append(list(captions))
        return torch.tensor([[float(len(caption))] for caption in captions])

    embedder = Embedder(encode, most=3)
    for batch in (("a", "bb"), ("bb", "ccc"), ("dddd", "a"), ("a", "dddd")):
        assert embedder(batch).flatten().tolist() == [float(len(caption)) for caption in batch]
        assert len(embedder._known) <= 3
    assert calls == [["a", "bb"], ["ccc"], ["a", "dddd"]]


def test_ranks_compute_in_what_the_first_rank_chose(tmp_path, monkeypatch):
    """With precision "auto" each rank chooses for itself and all take the first one's answer."""
    stage = StageConfig(epochs=0, global_batch=4, precision="auto")
    config = RunConfig(
        name="wiring",
        data=tiny_data.CONFIG,
        teacher=TeacherConfig(arch="vgg11", width=0.04, convention="symmetric"),
        captions=CaptionConfig(dim=8, width=8, max_chars=40),
        stage_one=stage,
        stage_two=dataclasses.replace(stage),
        lanes=4,
    )
    tiny_data.write(tmp_path / "data", tiny_data.records(train=5, test=0))
    teacher = empty_teacher(config.teacher)
    save_teacher(teacher, tmp_path / TEACHER)
    (tmp_path / TAP_MEANS).write_text(json.dumps(dict.fromkeys(teacher.names, 1.0)))
    save_encoder(new_encoder(config.captions), tmp_path / ENCODER)
    monkeypatch.setattr(sdn.stage_run, "choose_precision", lambda wanted, device: "float32")
    asked = []
    trainer = run_stage(
        "stage_one",
        config,
        StageInputs(data=tmp_path / "data", teacher=tmp_path, captions=tmp_path),
        save=lambda trainer: None,
        report=lambda step: None,
        rank=Rank(agree=lambda mine: asked.append(mine) or "bf16"),
    )
    assert asked == ["float32"]
    assert trainer.precision == "bf16"
