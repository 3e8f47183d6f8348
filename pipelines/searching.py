"""The search as a stage: short trials, the best of them at full length, and the choice."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from pipelines.cluster import cores
from pipelines.launch import run_trials
from pipelines.preparing import data_set
from pipelines.reasons import TrainingError
from pipelines.run import Done, Job, Run, perform
from pipelines.search_pictures import write_pictures
from pipelines.trials import Trial, TrialLedger, lower_is_better, order_of_merit
from pipelines.weights_from import WEIGHTS
from pipelines.work import distil, distillation_stage, keys_of, order_of
from sdn.choosing import Choice, Contender, choose, rank_correlation, worth_full_length
from sdn.config import to_dict
from sdn.sampling import open_student
from sdn.space import own_values, space_of, with_values
from sdn.stage_run import StageInputs
from sdn.validation import Validation, unpack_parts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from sdn.config import RunConfig
    from sdn.data.files import Files

TRIALS = "trials.json"
"""Of the stage's folder, beside the weights that `--weights-from` reads."""


def search(run: Run, inputs: dict[str, Done]) -> Job:
    """Trials of stage two (or of both stages) with other values, and whose values to go on with.

    Args:
        run: the run.
        inputs: role -> finished stage: data, teacher, captions, reference, and start, stage one,
            unless that is searched too.
    """
    config = run.config
    stage = distillation_stage(run, "search", config.stage_two, keys_of(inputs))
    more: dict[str, Any] = {"search": to_dict(config.search)}
    if config.search.stage_one:
        more["stage_one"] = to_dict(config.stage_one)
    stage = dataclasses.replace(stage, config=stage.config | more)

    def work(folder: Path) -> dict[str, Any]:
        if config.search.trials < 2:  # nothing to compare
            return {"values": {}, "trials": [], "chosen": None, "reason": "nothing was searched"}
        order = dataclasses.replace(
            order_of(run, stage, config, inputs, batch=config.stage_two.global_batch),
            stage="stage_two",
            threads=1,
        )
        return _Search(run, inputs, order.place()).result(order, folder)

    return Job(stage=stage, work=work)


class _Search:
    """One search: what it reads, its ledger, and its progress."""

    def __init__(self, run: Run, inputs: dict[str, Done], place: Files) -> None:
        self._run, self._inputs, self._place = run, inputs, place
        self._config, self._search = run.config, run.config.search
        self._ledger = TrialLedger(place)
        torch.set_num_threads(cores(run.settings))
        short = self._search.trials * self._search.images
        epochs = run.config.stage_two.epochs * (1 + self._search.reruns)
        long = inputs["data"].result["samples"]["train"] * epochs
        self._trials_share = short / (short + (long if self._search.reruns else 0.0))

    def result(self, order: Any, folder: Path) -> dict[str, Any]:
        """Run what is left to run, choose, and write pictures, trials and weights."""
        self._tell()
        run_trials(
            order,
            self._ledger,
            config=self._config,
            settings=self._run.settings,
            listen=self._tell,
        )
        trials = self._ledger.all()
        own = self._ledger.trials.get(0)
        if not any(trial.points for trial in trials):
            reasons = {trial.reason for trial in trials if trial.reason} or {"none was begun"}
            raise TrainingError(
                f"no trial of the search succeeded: {'; '.join(sorted(reasons))}. To try them "
                f"again, delete {self._place.uri}"
            )
        choice, full, contenders = self._choose(own)
        values = {} if choice.number == 0 else self._ledger.trials[choice.number].values
        short = {t.number: t.value for t in trials if t.state == "finished" and t.value is not None}
        scores = {number: one["value"] for number, one in full.items()}
        result = {
            "values": values,
            "own": own_values(self._config),
            "space": {name: list(found) for name, found in space_of(self._config).items()},
            "chosen": choice.number,
            "reason": choice.reason,
            "score": "KID" if lower_is_better(self._search) else "reciprocal rank",
            "trials": [trial_row(trial, full, contenders) for trial in trials],
            "rank_correlation": rank_correlation(short, scores),
            "spent_s": round(self._ledger.spent_s, 1),
        }
        result["pictures"] = write_pictures(folder, trials, self._config)
        (folder / TRIALS).write_text(json.dumps(result, indent=2))
        content = weights_content(self._config, values, self._inputs, choice)
        (folder / WEIGHTS).write_text(json.dumps(content, indent=2))
        return result

    def _choose(
        self, own: Trial | None
    ) -> tuple[Choice, dict[int, dict[str, Any]], dict[int, Contender]]:
        """The choice; scores at full length by trial, 0 for the recipe's own; short gains."""
        if own is None or own.state != "finished":
            why = "was not reached" if own is None else own.reason or own.state
            reason = f"the trial with the recipe's own values has no score to compare with: {why}"
            return Choice(number=0, reason=reason), {}, {}
        validation = self._validation()
        others = [t for t in self._ledger.all() if t.number and t.state == "finished"]
        first = self._parts(own)
        contenders = {
            t.number: Contender(
                number=t.number, gain=validation.gain(first, self._parts(t)), cost_s=t.seconds
            )
            for t in others
        }
        worth = worth_full_length(
            list(contenders.values()), self._search.reruns, self._search.rerun_level
        )
        if not worth:
            if self._search.reruns == 0:
                reason = "search.reruns=0: nothing was trained at full length"
            elif others:
                reason = (
                    "no short trial gained on the recipe's own values with a p-value up to "
                    f"{self._search.rerun_level:g} (search.rerun_level)"
                )
            else:
                reason = "no other trial came to its end"
            return Choice(number=0, reason=reason), {}, contenders
        full, parts = self._at_full_length(validation, [0, *worth])
        long = [
            Contender(
                number=n,
                gain=validation.gain(parts[0], parts[n]),
                # Of the short trial: it was not interrupted, or counts what was done before.
                cost_s=self._ledger.trials[n].seconds,
            )
            for n in worth
        ]
        for one in long:
            full[one.number]["gain"] = one.gain.gain.as_dict()
            full[one.number]["p_value"] = one.gain.p_value
        choice = choose(long, self._search.level, lambda a, b: validation.gain(parts[a], parts[b]))
        return choice, full, contenders

    def _at_full_length(
        self, validation: Validation, numbers: list[int]
    ) -> tuple[dict[int, dict[str, Any]], dict[int, Tensor]]:
        """Train the trials of these numbers as the pipeline's own stages, and score them.

        Their keys are those of the stages that follow the search: whoever is chosen is not trained
        again.
        """
        full, parts = {}, {}
        for position, number in enumerate(numbers):
            trial = self._ledger.trials[number]
            config = self._config if number == 0 else with_values(self._config, trial.values)
            done = self._full_length(config, number, position / len(numbers), 1 / len(numbers))
            student = open_student(self._run.store.fetch(done[-1].folder))
            standing = validation(student.state_dict())
            parts[number] = standing.parts
            full[number] = {
                "value": standing.score.value,
                "low": standing.score.low,
                "high": standing.score.high,
                "seconds": round(sum(one.seconds for one in done), 2),
                "stages": [one.folder for one in done],
            }
        return full, parts

    def _full_length(
        self, config: RunConfig, number: int, before: float, share: float
    ) -> list[Done]:
        """Stage two (and one, where it is searched) with these values, at the recipe's length."""
        about = "the recipe's own values" if number == 0 else f"trial {number}"

        def progress(stage: str, done: float, text: str) -> None:
            told = f"{about} at full length, {stage.replace('_', ' ')}: {text}" if text else ""
            along = self._trials_share + (1 - self._trials_share) * (before + share * done)
            self._run.progress("search", along, told)

        run = dataclasses.replace(self._run, progress=progress)
        inputs = {role: done for role, done in self._inputs.items() if role != "reference"}
        found = []
        if self._search.stage_one:
            found.append(perform(run, distil(run, "stage_one", inputs, config)))
            inputs["start"] = found[-1]
        found.append(perform(run, distil(run, "stage_two", inputs, config)))
        return found

    def _validation(self) -> Validation:
        run = self._run
        folders = {
            role: run.store.fetch(self._inputs[role].folder)
            for role in ("teacher", "captions", "reference")
        }
        reference = folders.pop("reference")
        inputs = StageInputs(data=data_set(run, self._inputs["data"]), **folders)
        return Validation(self._config, inputs, reference)

    def _parts(self, trial: Trial) -> Tensor:
        return unpack_parts(self._place.read(trial.points[-1]["parts"]))

    def _tell(self, last: Trial | None = None) -> None:
        """How far the trials are, and how the best of them stands."""
        trials, search = self._ledger.all(), self._search
        done = sum(search.images if t.ended else t.images_seen for t in trials)
        counts = Counter(trial.state for trial in trials)
        told = f"{sum(t.ended for t in trials)} of {search.trials} trials ended"
        if counts["stopped"] or counts["failed"]:
            told += f" ({counts['stopped']} early, {counts['failed']} failed)"
        best = order_of_merit(trials, search)
        if best:
            name = "KID" if lower_is_better(search) else "reciprocal rank"
            told += f", best {name} {best[0].value:.4g} (trial {best[0].number})"
        if last is not None and last.state == "failed":
            told += f"; trial {last.number} failed: {last.reason}"
        share = done / (search.trials * search.images)
        self._run.progress("search", self._trials_share * min(1.0, share), told)


def trial_row(
    trial: Trial, full: Mapping[int, dict[str, Any]], contenders: Mapping[int, Contender]
) -> dict[str, Any]:
    """All that is known of a trial, as JSON values."""
    found = dataclasses.asdict(trial) | {"value": trial.value, "seconds": round(trial.seconds, 2)}
    for point in found["points"]:
        point.pop("parts", None)
    if trial.number in contenders:
        gain = contenders[trial.number].gain
        found["gain"] = gain.gain.as_dict()
        found["p_value"] = gain.p_value
    if trial.number in full:
        found["full"] = full[trial.number]
    return found


def weights_content(
    config: RunConfig, values: Mapping[str, float], inputs: Mapping[str, Done], choice: Choice
) -> dict[str, Any]:
    """What `sdn run --weights-from` reads: changes of the config, and where they are from."""
    found = with_values(config, values)
    changes: dict[str, Any] = {
        "stage_two.weights": to_dict(found.stage_two.weights),
        "stage_two.rate": found.stage_two.rate,
        "stage_two.scale": found.stage_two.scale,  # what the weights are factors on
    }
    if config.search.stage_one:
        changes |= {
            "stage_one.weights": to_dict(found.stage_one.weights),
            "stage_one.rate": found.stage_one.rate,
            "stage_one.scale": found.stage_one.scale,
            "stage_one.epochs": found.stage_one.epochs,
            "stage_two.epochs": found.stage_two.epochs,
        }
    return {
        "recipe": config.name,
        "changes": changes,
        "trial": choice.number,
        "reason": choice.reason,
        "data": inputs["data"].result["manifest"],
    }
