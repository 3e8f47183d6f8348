"""The whole configuration of a run: frozen dataclasses, one per stage, checked when they are made.

`sdn.recipes` holds named runs, `with_overrides` changes single values, `to_dict` and `from_dict`
carry a config through JSON (checkpoints, manifests, stage keys).
"""

from sdn.config.data import DataConfig, Fit
from sdn.config.evaluation import (
    INCEPTION_DIGEST,
    INCEPTION_WEIGHTS,
    EvaluationConfig,
    JudgeConfig,
    PromotionConfig,
)
from sdn.config.networks import CaptionConfig, StudentConfig, TeacherConfig
from sdn.config.parsing import from_dict, to_dict, to_key, with_overrides
from sdn.config.run import RunConfig
from sdn.config.search import Range, SearchConfig
from sdn.config.stages import TAP_GROUPS, AdversarialConfig, LossWeights, Precision, StageConfig

__all__ = [
    "INCEPTION_DIGEST",
    "INCEPTION_WEIGHTS",
    "TAP_GROUPS",
    "AdversarialConfig",
    "CaptionConfig",
    "DataConfig",
    "EvaluationConfig",
    "Fit",
    "JudgeConfig",
    "LossWeights",
    "Precision",
    "PromotionConfig",
    "Range",
    "RunConfig",
    "SearchConfig",
    "StageConfig",
    "StudentConfig",
    "TeacherConfig",
    "from_dict",
    "to_dict",
    "to_key",
    "with_overrides",
]
