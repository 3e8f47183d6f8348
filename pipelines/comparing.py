"""The comparison as a stage: an evaluated model against the champion, and the report of both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.cluster import cores
from pipelines.evaluating import counting, found_of, independent_of, network_of
from pipelines.preparing import data_set
from pipelines.run import Done, Job, Run
from pipelines.stage import Stage
from sdn.config import to_dict
from sdn.draws import plan_draws
from sdn.evaluation import UNTRAINED, drawn_blocks, feature_file, open_evaluator, pictures
from sdn.features.rows import Rows
from sdn.promotion import Decision, decide
from sdn.reference import open_reference
from sdn.sampling import open_synthesizer
from sdn.scores.paired import paired_kid, paired_shares
from sdn.sheets import contact_sheet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pipelines.report import ReportParts

CHAMPION_SHEET = "champion-sheet.png"


@dataclass(frozen=True, kw_only=True)
class Champion:
    """What a challenger is compared with: the champion, or untrained weights without one."""

    title: str
    digest: str
    folder: Callable[[], Path] | None
    """Fetches its model; None for untrained weights. Not called where the comparison is done."""
    note: str = ""
    """What a reader of the decision has to know of it."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What has a say in a decision beside the comparison on the test split."""

    key: str
    """Of the stage that found it."""
    decide: Callable[[dict[str, Any]], dict[str, Any]]
    """A decision as JSON values -> the decision."""


def no_champion() -> Champion:
    """Where there is no champion yet, a model must beat untrained weights."""
    return Champion(title=UNTRAINED, digest=UNTRAINED, folder=None)


def compare(
    run: Run,
    inputs: dict[str, Done],
    scored: Done,
    challenger: Path,
    champion: Champion,
    parts: ReportParts,
    beside: Beside | None = None,
) -> Job:
    """The evaluated model against the champion, on the same captions and seeds, and the report.

    Args:
        run: the run.
        inputs: as for `evaluate`.
        scored: the finished evaluation of the challenger.
        challenger: folder of its model.
        champion: what to compare with.
        parts: what the report shows beside the scores.
        beside: what else has a say.
    """
    inputs_of_stage = {"evaluate": scored.key, "champion": f"{champion.title} {champion.digest}"}
    if beside is not None:
        inputs_of_stage["beside"] = beside.key
    stage = Stage(
        name="compare",
        config={"promotion": to_dict(run.config.promotion)},
        inputs=inputs_of_stage,
    )

    def work(folder: Path) -> dict[str, Any]:
        from pipelines.report import write_report

        result = _compare(run, folder, inputs, scored, challenger, champion)
        if beside is not None:
            result["decision"] = beside.decide(result["decision"])
        write_report(run, folder, scored, result, parts)
        return result

    return Job(stage=stage, work=work)


def _compare(
    run: Run,
    folder: Path,
    inputs: dict[str, Done],
    scored: Done,
    challenger: Path,
    champion: Champion,
) -> dict[str, Any]:
    torch.set_num_threads(cores(run.settings))
    config, name = run.config, scored.result["model"]
    evaluated = run.store.fetch(scored.folder)
    places = {role: run.store.fetch(inputs[role].folder) for role in ("reference", "judge")}
    real = open_reference(places["reference"])
    dim = real.about["features"]["dim"]
    mine = Rows(feature_file(evaluated, name), dim)
    if champion.folder is None:
        other, other_found = (
            Rows(feature_file(evaluated, UNTRAINED), dim),
            found_of(evaluated, UNTRAINED),
        )
        scores = scored.result["scores"][UNTRAINED]
    else:
        dataset = data_set(run, inputs["data"])
        draws = plan_draws(dataset, config.evaluation)
        network = network_of(run, inputs["teacher"])
        evaluator = open_evaluator(config.evaluation, dataset, draws, network, places, folder)
        model = open_synthesizer(champion.folder())
        drawn = evaluator.score(
            "champion", drawn_blocks(model, draws), counting(run, [champion.title], 0, draws)
        )
        evaluator.close()
        both = {"champion": model, "challenger": open_synthesizer(challenger)}
        numbers = draws.spread(config.evaluation.sheet)
        columns = {title: pictures(one, draws, numbers) for title, one in both.items()}
        captions = [draws.captions[n] for n in numbers]
        contact_sheet(columns, captions).save(folder / CHAMPION_SHEET)
        other, other_found, scores = drawn.features, drawn.found, drawn.scores
    decision = _decision(
        run,
        independent_of(evaluated),
        real.rows("test"),
        (other, other_found),
        (mine, found_of(evaluated, name)),
        champion,
    )
    feature_file(folder, "champion").unlink(missing_ok=True)  # nobody reads it any more
    return {
        "champion": champion.title,
        "champion_sha256": champion.digest,
        "champion_scores": scores,
        "decision": decision.as_dict(),
    }


def _decision(
    run: Run,
    independent: list[int],
    real: Rows,
    champion: tuple[Rows, Tensor | None],
    challenger: tuple[Rows, Tensor | None],
    other: Champion,
) -> Decision:
    match, held = None, 1.0
    if champion[1] is not None and challenger[1] is not None:
        held = float(champion[1][independent].mean())
        match = paired_shares(champion[1][independent], challenger[1][independent])
    kid = paired_kid(real, champion[0].pick(independent), challenger[0].pick(independent))
    decision = decide(kid, match, run.config.promotion, other.title, held)
    if other.note:
        decision = dataclasses.replace(decision, reason=f"{decision.reason}; {other.note}")
    return decision
