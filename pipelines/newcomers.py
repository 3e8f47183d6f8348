"""A champion and its challenger on the test images that came with the new data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from pipelines.cluster import cores
from pipelines.comparing import Beside, Champion
from pipelines.evaluating import Model, network_of
from pipelines.preparing import data_set
from pipelines.run import Done, Job, Run
from pipelines.stage import Stage
from sdn.config import to_dict
from sdn.data.dataset import DataSet
from sdn.data.history import came_since
from sdn.data.loader import split_blocks
from sdn.draws import plan_draws
from sdn.evaluation import Evaluator, drawn_blocks, feature_file
from sdn.features.rows import RowWriter
from sdn.judge import open_judge
from sdn.reference import JUDGE, Reference, about_network
from sdn.sampling import open_synthesizer
from sdn.scores.paired import paired_kid

if TYPE_CHECKING:
    from pathlib import Path

LEAST = 12
"""New test images below which nothing is said of them."""
_BATCH = 64


def new_test_images(data: DataSet, since: DataSet) -> DataSet | None:
    """The test split of what came since an earlier version, as a data set of its own.

    Returns:
        None where fewer than `LEAST` came, or `since` is no earlier version of the same data set.
    """
    came = came_since(since.manifest, data.manifest)
    if came is None or came.samples("test") < LEAST:
        return None
    segments = tuple(one for one in came.segments if one.split == "test")
    return DataSet(data.files, dataclasses.replace(came, segments=segments))


def compare_on_new(
    run: Run, inputs: dict[str, Done], since: Done, challenger: Model, champion: Champion
) -> Job | None:
    """Scores of both models on the new test images, and their paired difference.

    Args:
        run: the run.
        inputs: role -> finished stage: data (the new version), teacher, judge.
        since: data that the champion was trained on.
        challenger, champion: the models.

    Returns:
        None where there are too few such images, or there is no champion.
    """
    data = new_test_images(data_set(run, inputs["data"]), data_set(run, since))
    if data is None or champion.folder is None:
        return None
    stage = Stage(
        name="evaluate_new",
        config=to_dict(run.config.evaluation),
        inputs={
            "data": data.manifest.digest,
            "teacher": inputs["teacher"].result["sha256"],
            "judge": inputs["judge"].key,
            "challenger": challenger.digest,
            "champion": champion.digest,
        },
    )

    def work(folder: Path) -> dict[str, Any]:
        assert champion.folder is not None
        torch.set_num_threads(cores(run.settings))
        places = {"champion": champion.folder(), "challenger": challenger.folder}
        return _compare(run, folder, data, inputs, places)

    return Job(stage=stage, work=work)


def _compare(
    run: Run, folder: Path, data: DataSet, inputs: dict[str, Done], places: dict[str, Path]
) -> dict[str, Any]:
    draws = plan_draws(data, run.config.evaluation)
    network = network_of(run, inputs["teacher"])
    with RowWriter(folder / "test.f32") as writer:
        for block in split_blocks(data, "test", size=_BATCH):
            writer.write(network(block.pixels)[0])
    count = len(writer.rows())
    about = {"features": about_network(network), "images": {"test": count}}
    evaluator = Evaluator(
        data,
        draws,
        network,
        Reference(folder=folder, about=about),
        open_judge(run.store.fetch(inputs["judge"].folder) / JUDGE),
        folder,
        run.config.evaluation.splits,
    )
    drawn = {}
    for number, (name, place) in enumerate(places.items()):
        run.progress("evaluate_new", number / len(places), f"{name}: {len(draws):,} images")
        drawn[name] = evaluator.score(name, drawn_blocks(open_synthesizer(place), draws))
    evaluator.close()
    real, single = evaluator.reference.rows("test"), draws.independent()
    sides = [drawn[name].features.pick(single) for name in places]
    gain = paired_kid(real, *sides)
    loss = paired_kid(real, *reversed(sides))
    for name in ("test", *places):
        path = folder / "test.f32" if name == "test" else feature_file(folder, name)
        path.unlink(missing_ok=True)  # nobody reads them any more
    return {
        "images": count,
        "scores": {name: one.scores for name, one in drawn.items()},
        "gain": {k: getattr(gain.gain, k) for k in ("value", "low", "high", "count")},
        "better_p_value": gain.p_value,
        "worse_p_value": loss.p_value,
    }


def with_a_say(found: Done, level: float) -> Beside:
    """A model that is worse than the champion on the new data, beyond chance, is not promoted.

    Args:
        found: of `compare_on_new`.
        level: chance of refusing a version that is only as good there.
    """
    result = found.result
    gain = result["gain"]
    told = (
        f"on {result['images']:,} new test images the gain in KID is {gain['value']:+.3g} "
        f"({gain['low']:+.3g} to {gain['high']:+.3g})"
    )

    def decide(decision: dict[str, Any]) -> dict[str, Any]:
        new = {"new_data": gain | {"worse_p_value": result["worse_p_value"]}}
        if decision["promoted"] and result["worse_p_value"] < level:
            reason = f"worse on the new data beyond chance: {told}; on the fixed test split: "
            return decision | new | {"promoted": False, "reason": reason + decision["reason"]}
        return decision | new | {"reason": f"{decision['reason']}; {told}"}

    return Beside(key=found.key, decide=decide)
