"""The data report: what a version of a data set added, and how it differs from what was there."""

from __future__ import annotations

import base64
import dataclasses
import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from pipelines.cluster import cores
from pipelines.run import Done, Job, Run, perform
from pipelines.stage import Stage
from sdn.config import to_dict
from sdn.data.dataset import DataSet
from sdn.data.dead_letters import read_list
from sdn.data.history import came_since
from sdn.data.records import SPLITS
from sdn.data.texts import captions_of, random_samples
from sdn.drift import length_drift, two_sample_test, word_drift, words_of
from sdn.features.networks import Lite0, open_network
from sdn.metrics import pixel_features
from sdn.sheets import contact_sheet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from sdn.config import EvaluationConfig
    from sdn.data.manifest import Manifest
    from sdn.data.reading import SplitArrays

REPORT, SHEET = "report.json", "arrived.png"
SAMPLES = 400
"""Images a side whose features are compared."""
CAPTIONS = 200_000
"""Samples a side whose captions are read."""
_SHOWN_IMAGES, _SHOWN_LETTERS = 24, 20
_ALARM = 0.01
"""A p-value below this is told as a difference; of hourly looks one in a hundred would be."""


def report_stage(run: Run, before: Manifest | None, manifest: Manifest) -> Stage:
    """The stage of a report: two versions and how they are compared."""
    config = run.config.evaluation
    return Stage(
        name="data_report",
        config={
            "features": to_dict(config)["features"],
            "size": config.features_size,
            "samples": SAMPLES,
        },
        inputs={"data": manifest.digest, "before": before.digest if before else "nothing"},
    )


def write_data_report(run: Run, data: DataSet, before: Manifest | None) -> Done:
    """The report of a version against an earlier one, written once into the store.

    Args:
        run: its store and its evaluation's feature network are used.
        data: the later version.
        before: the earlier one; None for the first.

    Returns:
        The finished stage; `result` is the report, its folder has `SHEET`.

    Raises:
        ValueError: `before` is no earlier version of the data set.
    """
    return perform(run, report_job(run, data, before))


def report_job(run: Run, data: DataSet, before: Manifest | None) -> Job:
    """See `write_data_report`."""
    manifest = data.manifest
    came = manifest if before is None else came_since(before, manifest)
    if came is None:
        raise ValueError(
            f"{data.files.uri}: version {manifest.number} does not go on from {before}"
        )

    def work(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(cores(run.settings))
        new = DataSet(data.files, came)
        found: dict[str, Any] = {
            "place": data.files.uri,
            "version": manifest.number,
            "manifest": manifest.digest,
            "before": None if before is None else before.number,
            "came": came.counts,
            "samples": manifest.counts,
            "exclusions": _more(before.exclusions if before else {}, manifest.exclusions),
            **_letters(data, before),
            "captions": None,
            "lengths": None,
            "features": None,
        }
        if before is not None and any(came.counts.values()):
            found |= _drift(DataSet(data.files, before), new, run.config.evaluation)
        (folder / REPORT).write_text(json.dumps(found, indent=2))
        _write_sheet(folder / SHEET, new, manifest.attribution)
        return found

    return Job(stage=report_stage(run, before, manifest), work=work)


def _more(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Counts that are the later version's own."""
    found = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in found.items() if count > 0}


def _letters(data: DataSet, before: Manifest | None) -> dict[str, Any]:
    """Dead letters that the version before did not have."""
    known = set()
    if before is not None:
        known = {(x.key, x.where) for x in read_list(data.files, before.dead_letter_file)}
    letters = read_list(data.files, data.manifest.dead_letter_file)
    new = [x for x in letters if (x.key, x.where) not in known]
    shown = [{"key": x.key, "where": x.where, "reason": x.reason} for x in new[:_SHOWN_LETTERS]]
    return {"dead_letters": len(new), "first_dead_letters": shown}


def _drift(old: DataSet, new: DataSet, config: EvaluationConfig) -> dict[str, Any]:
    vocabulary: set[str] = set()
    before: list[int] = []
    for captions in islice(captions_of(old, "train"), CAPTIONS):
        before.append(len(captions[0]))
        for caption in captions:
            vocabulary.update(words_of(caption))
    arrived: list[str] = []
    lengths: list[int] = []
    for captions in islice(_all_captions(new), CAPTIONS):
        arrived += captions
        lengths.append(len(captions[0]))
    length = length_drift(before, lengths)
    return {
        "captions": word_drift(vocabulary, arrived).as_dict(),
        "lengths": None if length is None else dataclasses.asdict(length),
        "features": _feature_drift(old, new, config),
    }


def _all_captions(data: DataSet) -> Iterator[tuple[str, ...]]:
    return (captions for split in SPLITS for captions in captions_of(data, split))


def _feature_drift(old: DataSet, new: DataSet, config: EvaluationConfig) -> dict[str, Any] | None:
    """Training images against training images: which split one is in says nothing of it."""
    sides = [random_samples(data, "train", SAMPLES) for data in (old, new)]
    if any(side is None for side in sides):
        return None
    name, network = _network(config)
    first, second = (_rows(network, side) for side in sides if side is not None)
    found = two_sample_test(first, second)
    return None if found is None else dataclasses.asdict(found) | {"network": name}


def _network(config: EvaluationConfig) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What images are compared in: the evaluation's network, where it needs no teacher."""
    from pathlib import Path

    try:
        network = (
            Lite0(config.features_size)
            if config.features != "inception"
            else open_network(config, Path())
        )
    except ModuleNotFoundError:
        return "pixels at 32x32", pixel_features
    return network.name, lambda pixels: network(pixels)[0]


def _rows(network: Callable[[Tensor], Tensor], side: SplitArrays) -> Tensor:
    return torch.cat([network(block) for block in torch.split(side.pixels, 64)])


def _write_sheet(path: Path, new: DataSet, credit: str | None) -> None:
    """A picture of some of what came; none where nothing did."""
    for split in SPLITS:
        found = random_samples(new, split, _SHOWN_IMAGES)
        if found is not None:
            captions = [one[0] for one in found.captions]
            contact_sheet({"arrived": found.pixels}, captions, footer=credit).save(path)
            return


def told(report: dict[str, Any]) -> list[str]:
    """What a report says, a sentence each."""
    came = ", ".join(f"{split} {report['came'][split]:,}" for split in SPLITS)
    lines = [f"Version {report['version']} of {report['place']}: {came} samples came."]
    lines += [f"Left out: {what}: {n:,}." for what, n in report["exclusions"].items()]
    if report["dead_letters"]:
        lines.append(f"{report['dead_letters']:,} could not be used.")
    words, length, features = report["captions"], report["lengths"], report["features"]
    if words is not None:
        most = ", ".join(word for word, _ in words["most"][:8])
        lines.append(
            f"Words never seen before: {words['unseen_word_share']:.1%} of {words['words']:,}, in "
            f"{words['unseen_caption_share']:.1%} of {words['captions']:,} captions"
            f"{f' ({most})' if most else ''}."
        )
    if length is not None:
        lines.append(
            f"Length of captions: median {length['median']:g} characters, before "
            f"{length['median_before']:g}; {_verdict(length['p_value'])}."
        )
    if features is not None:
        lines.append(
            f"Images ({features['network']}, {features['second']:,} against {features['first']:,} "
            f"of before): squared MMD {features['value']:.3g}; {_verdict(features['p_value'])}."
        )
    elif report["before"] is not None:
        lines.append("Images: too few training samples came to compare their features.")
    return lines


def differs(report: dict[str, Any]) -> bool:
    """Whether lengths of captions or features of images differ beyond chance from before."""
    tests = (report["lengths"], report["features"])
    return any(found is not None and found["p_value"] < _ALARM for found in tests)


def _verdict(p_value: float) -> str:
    said = "differs beyond chance" if p_value < _ALARM else "no difference beyond chance"
    return f"{said}, p = {p_value:.2g}"


def markdown(report: dict[str, Any], folder: Path) -> str:
    """A report for a page: its sentences, counts, dead letters and picture."""
    rows = [
        "| | came | now |",
        "|---|---:|---:|",
        *(f"| {s} | {report['came'][s]:,} | {report['samples'][s]:,} |" for s in SPLITS),
    ]
    letters = [
        f"- `{one['where']}`: {one['reason'].replace('`', chr(39))}"
        for one in report["first_dead_letters"]
    ]
    if letters:
        letters = ["", "## Could not be used", "", *letters]
    picture = []
    if (folder / SHEET).is_file():
        data = base64.b64encode((folder / SHEET).read_bytes()).decode()
        picture = ["", f"![what came](data:image/png;base64,{data})"]
    said = "\n\n".join(told(report))
    return "\n".join(["# What came", "", said, "", *rows, *letters, *picture])
