"""Evaluation as stages: the reference, the judge, and the scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.cluster import cores
from pipelines.preparing import data_set
from pipelines.run import Done, Job, Run
from pipelines.stage import Stage
from sdn.captions import normalise, open_encoder
from sdn.config import to_dict, to_key
from sdn.draws import Draws, plan_draws
from sdn.evaluation import (
    REAL,
    UNTRAINED,
    Drawn,
    Evaluator,
    baseline_scores,
    blocks_again,
    class_table,
    drawn_blocks,
    open_evaluator,
    pictures,
    synthesizer_of,
)
from sdn.features.networks import lite0_digest, open_network
from sdn.memory import keep_freed_memory
from sdn.reference import open_reference, write_judge, write_reference
from sdn.sampling import ENCODER, encode_png, open_synthesizer
from sdn.scores.diversity import caption_diversity
from sdn.sheets import contact_sheet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sdn.config import EvaluationConfig
    from sdn.features.networks import FeatureNetwork
    from sdn.sampling import Synthesizer
    from sdn.scores.sets import SetScores

SHEET, EXTREMES = "contact-sheet.png", "extremes"
SCORES, CAPTIONS, SAMPLES = "scores.json", "captions.json", "samples"
_SHOWN = 8
"""Best and worst captions shown."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to be scored."""

    digest: str
    """Key of its stage, or digest of its folder: part of the evaluation's key."""
    folder: Path


def reference(run: Run, data: Done, taught: Done) -> Job:
    """Features of the real images and their scores against themselves, once for a data set."""
    config = run.config.evaluation
    stage = Stage(
        name="reference",
        config=_network_config(config) | {"real_images": config.real_images},
        inputs={"data": data.result["manifest"]} | _teacher_input(config, taught),
    )

    def work(folder: Path) -> dict[str, Any]:
        return write_reference(
            folder,
            data_set(run, data),
            network_of(run, taught),
            config,
            lambda share, text: run.progress("reference", share, text),
        )

    return Job(stage=stage, work=work)


def judge(run: Run, data: Done, real: Done) -> Job:
    """The joint embedding that caption match is judged by; no generator reads it."""
    config = run.config.evaluation.judge
    stage = Stage(name="judge", config=to_dict(config), inputs={"reference": real.key})

    def work(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(cores(run.settings))
        return write_judge(
            folder,
            data_set(run, data),
            open_reference(run.store.fetch(real.folder)),
            config,
            lambda share, text: run.progress("judge", share, text),
        )

    return Job(stage=stage, work=work)


def evaluate(run: Run, inputs: dict[str, Done], models: Mapping[str, Model]) -> Job:
    """Scores of models on the test split, floors, ceiling and baselines beside them.

    Args:
        run: the run.
        inputs: role -> finished stage: data, teacher, captions, reference, judge.
        models: name -> model; the last one is the one that may be registered.
    """
    stage = Stage(
        name="evaluate",
        config=to_dict(run.config.evaluation)
        | {"untrained": [to_key(run.config.student), run.config.stage_one.seed]},
        inputs={role: done.key for role, done in inputs.items() if role != "data"}
        | {"data": inputs["data"].result["manifest"]}
        | {name: model.digest for name, model in models.items()},
    )

    def work(folder: Path) -> dict[str, Any]:
        return _evaluate(run, folder, inputs, models)

    return Job(stage=stage, work=work)


def _evaluate(
    run: Run, folder: Path, inputs: dict[str, Done], models: Mapping[str, Model]
) -> dict[str, Any]:
    torch.set_num_threads(cores(run.settings))
    config, dataset = run.config, data_set(run, inputs["data"])
    draws = plan_draws(dataset, config.evaluation)
    network = network_of(run, inputs["teacher"])
    places = {role: run.store.fetch(inputs[role].folder) for role in ("reference", "judge")}
    evaluator = open_evaluator(config.evaluation, dataset, draws, network, places, folder)
    opened = {name: open_synthesizer(model.folder) for name, model in models.items()}
    encoder = open_encoder(run.store.fetch(inputs["captions"].folder) / ENCODER)
    opened[UNTRAINED] = synthesizer_of(config, encoder, None)

    def blocks(name: str) -> Iterator[Tensor]:
        return evaluator.real() if name == REAL else drawn_blocks(opened[name], draws)

    drawn: dict[str, Drawn] = {}
    names = [*models, UNTRAINED, REAL]
    for number, name in enumerate(names):
        drawn[name] = evaluator.score(name, blocks(name), counting(run, names, number, draws))
    scores: dict[str, SetScores] = {name: found.scores for name, found in drawn.items()}
    kept = ("r_precision_score", "inception_score", "diversity_score")
    scores[REAL] = {name: scores[REAL][name] for name in kept}  # no retrieval of themselves
    scores |= baseline_scores(evaluator, draws)
    last = list(models)[-1]
    moved = {
        name: evaluator.noise_apart(drawn[name], blocks_again(opened[name], draws))
        for name in models
        if opened[name].noise
    }
    for name, distances in moved.items():
        scores[name]["caption_diversity_score"] = caption_diversity(distances).as_dict()
    classes = class_table(draws, drawn[last], drawn[REAL].features, moved.get(last))
    evaluator.close()
    about = evaluator.reference.about
    result = {
        "scores": scores,
        "floors": about["floors"],
        "figures": {name: two_figures(scores[name]) for name in models},
        "classes": classes,
        "settings": {
            "protocol": config.evaluation.protocol,
            "images": len(draws),
            "different_images": len(draws.independent()),
            "image_px": about["image_px"],
            "features": about["features"],
            "reference": {"sha256": about["digest"], "images": about["images"]["test"]},
            "judge": inputs["judge"].key,
            "judge_held_out_score": inputs["judge"].result["held_out_score"],
            "noise_scale": opened[last].noise_scale if opened[last].noise else None,
        },
        "model": last,
        "headline": scores[last]["pixels/top1_score"]["value"],
        "captions": len(draws),
        "example": readable(draws, config.captions.max_chars, 1)[0],
    }
    write_captions(folder / CAPTIONS, draws, drawn)
    _write_samples(folder / SAMPLES, opened[last], draws, config.evaluation.samples)
    credit = inputs["data"].result["attribution"]
    shown = {name: opened[name] for name in models}
    result["extremes"] = _write_extremes(folder, evaluator, draws, shown, drawn[last])
    _write_sheet(folder / SHEET, evaluator, draws, shown, config.evaluation.sheet, credit)
    (folder / SCORES).write_text(json.dumps(result, indent=2))
    return result


def two_figures(scores: SetScores) -> dict[str, Any]:
    """The figures of the paper's two gaps: caption match (heterogeneous), KID (homogeneous)."""
    return {"caption match": scores["r_precision_score"], "KID": scores["kid_error"]}


def counting(run: Run, names: Sequence[str], number: int, draws: Draws) -> Any:
    """What tells the run how many captions the model of this number among `names` has drawn."""

    def report(done: int) -> None:
        share = (number + done / len(draws)) / len(names)
        run.progress("evaluate", share, f"{names[number]}: {done:,} of {len(draws):,} images")

    return report


def _network_config(config: EvaluationConfig) -> dict[str, Any]:
    """What says which feature network it is."""
    found: dict[str, Any] = {"features": config.features}
    if config.features == "lite0":
        found |= {"size": config.features_size, "weights": lite0_digest()}
    if config.features == "inception":
        found["weights"] = config.inception_sha256
    return found


def _teacher_input(config: EvaluationConfig, taught: Done) -> dict[str, str]:
    return {"teacher": taught.result["sha256"]} if config.features == "teacher" else {}


def network_of(run: Run, taught: Done) -> FeatureNetwork:
    """The feature network of a run's evaluation."""
    torch.set_num_threads(cores(run.settings))
    keep_freed_memory()
    return open_network(run.config.evaluation, run.store.fetch(taught.folder))


def write_captions(path: Path, draws: Draws, drawn: Mapping[str, Drawn]) -> None:
    """What became of each caption, for each set: found by the judge or not, ranks."""
    content = {
        "captions": list(draws.captions),
        "keys": [draws.keys[row] for row in draws.truth],
        "sets": {
            name: {
                "found": None if one.found is None else one.found.int().tolist(),
                "ranks": {space: ranks.tolist() for space, ranks in one.ranks.items()},
            }
            for name, one in drawn.items()
        },
    }
    path.write_text(json.dumps(content))


def found_of(folder: Path, name: str) -> Tensor | None:
    """(N,) which captions of a set were found, out of an evaluation's folder."""
    found = json.loads((folder / CAPTIONS).read_text())["sets"][name]["found"]
    return None if found is None else torch.tensor(found, dtype=torch.float32)


def independent_of(folder: Path) -> list[int]:
    """Numbers of the draws of an evaluation that are the first of their true image."""
    keys = json.loads((folder / CAPTIONS).read_text())["keys"]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    return sorted(first.values())


def _write_samples(folder: Path, model: Synthesizer, draws: Draws, count: int) -> None:
    """Images as files, of captions that generation takes: what is registered must draw the same."""
    folder.mkdir(exist_ok=True)
    listed = []
    for number, caption in enumerate(readable(draws, model.max_chars, count)):
        name = f"{number:02d}.png"
        (folder / name).write_bytes(encode_png(model([caption], seed=draws.seed)[0]))
        listed.append({"caption": caption, "seed": draws.seed, "file": name})
    (folder / "samples.json").write_text(json.dumps({"samples": listed}, indent=2))


def readable(draws: Draws, most: int, count: int) -> list[str]:
    """Captions that generation takes, spread over the draws: cut where all are too long.

    Raises:
        ValueError: none of the captions has a letter or digit.
    """
    told = [caption for caption in draws.captions if normalise(caption)]
    short = [caption for caption in told if len(normalise(caption)) <= most]
    found = short or [normalise(caption)[:most].strip() for caption in told]
    if not found:
        raise ValueError("no test caption has a letter or digit: nothing can be drawn of them")
    return [found[i * len(found) // min(count, len(found))] for i in range(min(count, len(found)))]


def _true_pictures(evaluator: Evaluator, numbers: Sequence[int]) -> Tensor:
    """(N, 3, H, W) uint8, true images of the draws of these numbers."""
    wanted, found, start = {*numbers}, {}, 0
    for block in evaluator.real():
        for n in range(start, start + len(block)):
            if n in wanted:
                found[n] = block[n - start].clone()
        start += len(block)
    return torch.stack([found[n] for n in numbers])


def _write_sheet(
    path: Path,
    evaluator: Evaluator,
    draws: Draws,
    models: Mapping[str, Synthesizer],
    rows: int,
    credit: str | None,
) -> None:
    numbers = draws.spread(rows)
    columns = {"real": _true_pictures(evaluator, numbers)}
    columns |= {title: pictures(model, draws, numbers) for title, model in models.items()}
    footer = f"Left column ('real'): {credit}" if credit else None
    contact_sheet(columns, [draws.captions[n] for n in numbers], footer=footer).save(path)


def _write_extremes(
    folder: Path,
    evaluator: Evaluator,
    draws: Draws,
    models: Mapping[str, Synthesizer],
    last: Drawn,
) -> list[dict[str, Any]]:
    """The captions retrieved best and worst: pictures as files, and what is said of each."""
    numbers = extremes(last)
    columns = {"real": _true_pictures(evaluator, numbers)}
    columns |= {title: pictures(model, draws, numbers) for title, model in models.items()}
    place = folder / EXTREMES
    place.mkdir(exist_ok=True)
    listed = []
    for position, n in enumerate(numbers):
        files = {}
        for column, (title, images) in enumerate(columns.items()):
            files[title] = f"{position:02d}-{column}.png"
            (place / files[title]).write_bytes(encode_png(images[position]))
        listed.append(
            {
                "caption": draws.captions[n],
                "key": draws.keys[draws.truth[n]],
                "ranks": {space: int(ranks[n]) for space, ranks in last.ranks.items()},
                "found": None if last.found is None else bool(last.found[n]),
                "best": position < len(numbers) / 2,
                "files": files,
            }
        )
    return listed


def extremes(drawn: Drawn, count: int = _SHOWN) -> list[int]:
    """Numbers of the draws with the best ranks, best first, then of the worst, worst last."""
    both = drawn.ranks["pixels"].double().log() + drawn.ranks["features"].double().log()
    order = both.argsort(stable=True).tolist()
    count = min(count, len(order) // 2)
    return [*order[:count], *order[len(order) - count :]]
