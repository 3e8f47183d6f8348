"""A small search with everything that it reads, and the process that runs it."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import tiny_data
import training_place
from evaluated import JUDGE_CONFIG

from pipelines.run import Done, Run, RunSpec, perform
from pipelines.searching import search
from pipelines.settings import Settings
from pipelines.store import LocalStore
from pipelines.trials import Trial, TrialLedger
from sdn.config import EvaluationConfig, with_overrides
from sdn.data.dataset import open_dataset
from sdn.data.files import LocalFolder
from sdn.features.networks import open_network
from sdn.reference import write_reference
from sdn.stage_run import StageInputs, new_student, write_model
from sdn.trial import Reached, run_trial
from sdn.validation import Validation

SAMPLES = 90
CONFIG = dataclasses.replace(
    training_place.CONFIG, evaluation=EvaluationConfig(features="teacher", judge=JUDGE_CONFIG)
)
WHERE: ContextVar[str] = ContextVar("where")
"""Set where the search is started; the terminal and Prefect's run are found in such a way."""
ROLES = ("data", "teacher", "captions", "reference", "start")


def write_store(folder: Path) -> None:
    """Data set, teacher, captions, reference and stage one, as finished folders of a store."""
    training_place.write_store(folder)
    store = LocalStore(folder)
    items = [tiny_data.record(n) for n in range(SAMPLES)]
    items += [tiny_data.record(n, "validation") for n in range(SAMPLES, SAMPLES + 12)]
    items += [tiny_data.record(n, "test") for n in range(SAMPLES + 12, SAMPLES + 16)]
    tiny_data.write(store.workspace("search-data"), items)
    store.publish("search-data", {})
    network = open_network(CONFIG.evaluation, folder / "teacher")
    place = store.workspace("reference")
    write_reference(place, folder / "search-data", network, CONFIG.evaluation)
    store.publish("reference", {})
    start = store.workspace("start")
    write_model(start, CONFIG, folder / "captions", new_student(CONFIG).state_dict())
    store.publish("start", {})


def inputs_of(folder: Path) -> dict[str, Done]:
    """What the stage `search` reads."""
    data = {
        "samples": {"train": SAMPLES, "validation": 12, "test": 4},
        "manifest": open_dataset(folder / "search-data").manifest.digest,
        "place": None,
    }
    return {
        role: Done(
            name=role,
            key=f"{number:064x}",
            folder="search-data" if role == "data" else role,
            result=data if role == "data" else {},
            seconds=0.0,
            fresh=False,
        )
        for number, role in enumerate(ROLES)
    }


def run_of(folder: Path, changes: dict[str, str]) -> Run:
    """A run in the store whose config has these changes."""
    config = with_overrides(CONFIG, {"search.reruns": "0", "search.captions": "12"} | changes)

    return Run(
        spec=RunSpec("tiny", {}, str(folder)),
        config=config,
        settings=Settings(store=str(folder), cache=folder / "cache"),
        progress=lambda stage, share, text: say("told", text=text, where=WHERE.get("nowhere")),
    )


def job_of(run: Run, folder: Path):
    """The search as a stage."""
    inputs = inputs_of(folder)
    if run.config.search.stage_one:
        del inputs["start"]
    return search(run, inputs)


def ledger_of(folder: Path, changes: dict[str, str]) -> TrialLedger:
    """The ledger of the search with these changes."""
    run = run_of(folder, changes)
    name = job_of(run, folder).stage.short
    return TrialLedger(LocalFolder(folder / "training" / name))


def alone(folder: Path, changes: dict[str, str]) -> dict[str, Any]:
    """The recipe's own trial in this process: images seen and score at its end."""
    inputs = StageInputs(
        data=folder / "search-data",
        teacher=folder / "teacher",
        captions=folder / "captions",
        start=folder / "start",
    )
    config = run_of(folder, changes).config
    validation = Validation(config, inputs, folder / "reference")
    found: dict[str, Any] = {}

    def reached(point: Reached) -> None:
        value = validation(point.weights()).score.value
        found.update(images_seen=point.images_seen, value=value)

    run_trial(config, inputs, reached)
    return found


def main(folder: str, changes: str) -> None:
    """Run the search; say each record written, what Ray still holds afterwards, and the result."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table
    from ray.util.state import list_actors

    from pipelines.cluster import start_ray, stop_ray
    from pipelines.orphans import ended_with_this_process

    write = TrialLedger.write

    def written(ledger: TrialLedger, trial: Trial) -> None:
        write(ledger, trial)
        say("trial", number=trial.number, state=trial.state, images_seen=trial.images_seen)

    TrialLedger.write = written  # type: ignore[method-assign]
    WHERE.set("here")
    place = Path(folder)
    run = run_of(place, json.loads(changes))
    with ended_with_this_process():
        try:
            foreign = None
            if run.settings.ray_address is not None:
                start_ray(run.settings)
                foreign = placement_group([{"memory": 2**20}]).id.hex()
            done = perform(run, job_of(run, place))
            if ray.is_initialized():
                states = {n: group["state"] for n, group in placement_group_table().items()}
                assert states.pop(foreign, "CREATED") == "CREATED", "another's group is gone"
                held = [name for name, state in states.items() if state != "REMOVED"]
                alive: list = []
                if run.settings.ray_address is not None:  # a Ray of this process has no dashboard
                    alive = list_actors(filters=[("state", "!=", "DEAD")])
                say("held", groups=len(held), actors=[one.class_name for one in alive])
        finally:
            stop_ray()
    say("done", **done.result)


def say(kind: str, **values) -> None:
    """A line for who started this process."""
    print(json.dumps([kind, values]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
