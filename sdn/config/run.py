"""The whole of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdn.config.data import DataConfig
from sdn.config.evaluation import EvaluationConfig, PromotionConfig
from sdn.config.networks import CaptionConfig, StudentConfig, TeacherConfig
from sdn.config.required import require
from sdn.config.search import SearchConfig
from sdn.config.stages import AdversarialConfig, StageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run. `sdn.recipes` holds the named ones."""

    name: str
    """Name of the recipe; the registered model is called `sdn-{name}`."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    stage_one: StageConfig = field(default_factory=StageConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    stage_two: StageConfig = field(default_factory=StageConfig)
    stage_three: AdversarialConfig = field(default_factory=AdversarialConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
    lanes: int = 48
    """Parallel sample sequences an epoch is cut into; a world size must divide it."""
    workers: int = 1
    """Training processes (Ray workers) of a stage; must divide `lanes`."""
    max_workers: int | None = None
    """Elastic: as many processes as the cluster has room for, from `workers` up to this many; each
    of these numbers must divide `lanes`. None keeps to `workers`."""
    threads: int = 0
    """CPU threads a worker; 0 shares this machine's cores out among the workers."""

    def __post_init__(self) -> None:
        require(self.lanes > 0, f"lanes must be > 0, not {self.lanes}")
        require(self.threads >= 0, f"threads must be >= 0, not {self.threads}")
        most = self.workers if self.max_workers is None else self.max_workers
        require(
            0 < self.workers <= most,
            f"workers must be > 0 and at most max_workers, not {self.workers} and {most}",
        )
        possible = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
        wrong = [n for n in range(self.workers, most + 1) if n not in possible]
        require(
            not wrong,
            f"workers must divide lanes ({self.lanes}), {wrong[0] if wrong else 0} does not; "
            f"possible: {possible}",
        )
        require(
            self.stage_three.diversity == 0 or self.student.noise > 0,
            f"stage_three.diversity ({self.stage_three.diversity}) needs student.noise > 0, for "
            "without noise a caption has one image; set both, or stage_three.diversity=0",
        )
        third = ("stage_three",) if self.stage_three.epochs else ()
        for stage in ("stage_one", "stage_two", *third):
            batch = getattr(self, stage).global_batch
            require(
                most <= batch,
                f"workers ({most}) must be at most {stage}.global_batch ({batch})",
            )
