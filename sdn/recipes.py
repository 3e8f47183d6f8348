"""Named runs: functions that return a whole config."""

from __future__ import annotations

from sdn.config import (
    CaptionConfig,
    DataConfig,
    LossWeights,
    RunConfig,
    SearchConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)


def openmoji() -> RunConfig:
    """The embedded data set at 64 px, a quarter-width VGG19 fitted on it: 15 minutes on 2 cores."""
    weights = LossWeights(image=20, conv1=1, conv2=1, conv3=1, conv4=0.3, conv5=0.3)
    stage = StageConfig(
        global_batch=32,
        rate=2e-3,
        schedule="one-cycle",
        weights=weights,
        scale="relative",
        average_share=0.05,
    )
    return RunConfig(
        name="openmoji",
        data=DataConfig(source="openmoji", resolution=64),
        teacher=TeacherConfig(width=0.25, convention="symmetric"),
        captions=CaptionConfig(dim=256, width=128, max_chars=128, epochs=40),
        student=StudentConfig(init="he"),
        stage_one=_replace(stage, epochs=2),
        search=SearchConfig(trials=4, images=8_000),
        stage_two=_replace(stage, epochs=22),
    )


def _replace(stage: StageConfig, **changes: float) -> StageConfig:
    import dataclasses

    return dataclasses.replace(stage, **changes)  # type: ignore[arg-type]
