"""How often the promotion rule is right: A/A trials, and planted changes of 10% in full-set KID.

    python tests/benchmarks/promotion.py [--work DIR] [--trials 200] [--captions N] [--json]

Two models of the embedded recipe that differ in their seed alone (short ones are trained into
`--work` the first time; `--models A B` takes two model folders, of the data set and teacher in
`--work`) draw every caption of the data set. A trial takes as many of these as the test split has
(or `--captions`) and asks `sdn.promotion.decide` as a release does.

A/A: the two models' images are swapped caption by caption by a fair coin, so that champion and
challenger are equally good and never the same. Planted: some images of a model are mixed with the
true ones (or with the mean of all), as many as bring its KID on all captions to 10% below (or
above) that of the champion, the first seed's model. The changes are planted in the champion's own
images, as where a challenger was trained on from the champion, and in those of the other seed,
which differ from the champion's in every picture: that takes more captions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sdn.config import PromotionConfig
from sdn.data.dataset import open_dataset
from sdn.data.loader import load_split
from sdn.data.records import SPLITS
from sdn.evaluation import drawn_blocks
from sdn.features.networks import open_network
from sdn.features.rows import RowWriter
from sdn.judge import open_judge
from sdn.promotion import decide
from sdn.recipes import recipe
from sdn.reference import JUDGE, open_reference, write_judge, write_reference
from sdn.sampling import open_synthesizer
from sdn.scores.kernel import kid
from sdn.scores.matching import found_captions, mismatched
from sdn.scores.paired import paired_kid, paired_shares

CONFIG = recipe("openmoji")
SHARED = ("prepare", "teacher", "captions")
CHANGE = 0.1
SHORT = {"stage_one.epochs": "1", "stage_two.epochs": "5"}


def trained(work: Path, threads: int) -> list[Path]:
    """Folders of two models that differ in their seed; what is there is not trained again."""
    for seed in (0, 1):
        place = work / f"seed-{seed}"
        for name in SHARED if seed else ():
            if not (place / name).exists():
                shutil.copytree(work / "seed-0" / name, place / name)
        seeds = {"stage_one.seed": str(seed), "stage_two.seed": str(seed)}
        changes = [x for k, v in (SHORT | seeds).items() for x in ("--set", f"{k}={v}")]
        command = ["-m", "sdn", "all", "--work", str(place), "--threads", str(threads), *changes]
        subprocess.run([sys.executable, *command], check=True)
    return [work / f"seed-{seed}" / "stage-two" for seed in (0, 1)]


class Population:
    """Every caption of the data set, drawn by both models: features, and what the judge found."""

    def __init__(self, work: Path, models: list[Path]) -> None:
        data, teacher = work / "seed-0" / "prepare", work / "seed-0" / "teacher"
        self.scratch = Path(tempfile.mkdtemp(prefix="promotion-"))
        splits = [s for s in SPLITS if open_dataset(data).samples(s)]
        loaded = [load_split(data, split) for split in splits]
        real = torch.cat([one.pixels for one in loaded])
        self.captions = [found[0] for one in loaded for found in one.captions]
        self.tests = len(loaded[splits.index("test")].keys)
        network = open_network(CONFIG.evaluation, teacher)
        folder = work / "reference"
        folder.mkdir(exist_ok=True)
        if not (folder / JUDGE).is_file():
            say("reference and judge")
            write_reference(folder, data, network, CONFIG.evaluation)
            write_judge(folder, data, open_reference(folder), CONFIG.evaluation.judge)
        reference, judge = open_reference(folder), open_judge(folder / JUDGE)
        self.real = torch.cat([reference.rows(s).read(0, len(self.captions)) for s in splits])
        chosen = mismatched(self.captions, self.captions)
        self.features, self.found = {}, {}

        def add(name: str, pixels: torch.Tensor) -> None:
            kept = work / f"{name.replace(' ', '-')}.pt"
            if not kept.is_file():
                say(f"features of {name}")
                torch.save(torch.cat([network(block)[0] for block in pixels.split(64)]), kept)
            self.features[name] = torch.load(kept)
            rows = self.rows(self.features[name], name.replace(" ", "-"))
            self.found[name] = found_captions(judge, rows, self.captions, self.captions, chosen)

        for name, model in zip(("first", "second"), models, strict=True):
            drawn = open_synthesizer(model)
            draws = _Captions(self.captions)
            images = torch.cat(list(drawn_blocks(drawn, draws)))
            add(name, images)
            mean = images.float().mean(0, keepdim=True)
            for kind, other in {"better": real, "worse": mean}.items():
                add(f"{name} {kind}", ((images.float() + other) / 2).round().to(torch.uint8))

    def rows(self, features: torch.Tensor, name: str):
        with RowWriter(self.scratch / name) as writer:
            writer.write(features)
        return writer.rows()

    def full_kid(self, features: torch.Tensor) -> float:
        return float(kid(self.rows(self.real, "real"), self.rows(features, "full")).value)

    def planted(self, base: str, wanted: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Features and finds of a model with some images replaced, and how many: bisected until its
        KID on all captions is `wanted`."""
        kind = "better" if self.full_kid(self.features[base]) > wanted else "worse"
        order = torch.rand(len(self.captions), generator=torch.Generator().manual_seed(5)).argsort()
        low, high = 0.0, 1.0
        for _ in range(12):
            share = (low + high) / 2
            features, found = self.features[base].clone(), self.found[base].clone()
            rows = order[: round(share * len(order))]
            features[rows] = self.features[f"{base} {kind}"][rows]
            found[rows] = self.found[f"{base} {kind}"][rows]
            value = self.full_kid(features)
            if (value > wanted) == (kind == "better"):
                low = share
            else:
                high = share
        return features, found, share

    def trial(self, champion, challenger, rows: torch.Tensor):
        """What a release would decide that saw these captions only."""
        parts = (self.real, champion[0], challenger[0])
        real, one, two = (self.rows(x[rows], f"trial-{i}") for i, x in enumerate(parts))
        match = paired_shares(champion[1][rows], challenger[1][rows])
        held = float(champion[1][rows].mean())
        return decide(paired_kid(real, one, two), match, PromotionConfig(), "the champion", held)


class _Captions:
    """As `sdn.draws.Draws`, of any captions."""

    def __init__(self, captions: list[str]) -> None:
        self.captions, self.seed = captions, 0

    def __len__(self) -> int:
        return len(self.captions)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(people: Population, trials: int, count: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(11)
    total = len(people.captions)
    sets = {name: (people.features[name], people.found[name]) for name in people.features}
    full = {name: people.full_kid(sets[name][0]) for name in ("first", "second")}
    found: dict[str, object] = {"full-set KID": full, "captions a trial": count, "trials": trials}

    def sample() -> torch.Tensor:
        return torch.randperm(total, generator=generator)[:count]

    promoted = 0
    for _ in range(trials):
        coin = torch.rand(total, generator=generator) < 0.5
        swapped = [
            tuple(
                torch.where(coin.view(-1, *[1] * (a.dim() - 1)), a, b)
                for a, b in zip(x, y, strict=True)
            )
            for x, y in ((sets["first"], sets["second"]), (sets["second"], sets["first"]))
        ]
        promoted += people.trial(*swapped, sample()).promoted
    found["A/A promoted"] = promoted / trials
    for base in ("first", "second"):
        for kind, factor in {"better": 1 - CHANGE, "worse": 1 + CHANGE}.items():
            title = f"{kind} by {CHANGE:.0%}, planted in the {base} model"
            features, matches, share = people.planted(base, factor * full["first"])
            decisions = [
                people.trial(sets["first"], (features, matches), sample()) for _ in range(trials)
            ]
            found[f"{title}: full-set KID"] = value = people.full_kid(features)
            found[f"{title}: share of images changed"] = share
            found[f"{title}: promoted"] = sum(d.promoted for d in decisions) / trials
            by_kid = sum(d.kid.p_value < PromotionConfig().level for d in decisions) / trials
            found[f"{title}: KID alone would promote"] = by_kid
            if kind == "better":
                errors = torch.tensor([d.kid.error for d in decisions]).square().mean().sqrt()
                # The error falls with the square root of the captions.
                needed = count * ((1.96 + 0.8416) * float(errors) / (full["first"] - value)) ** 2
                found[f"{title}: captions needed for 80%"] = round(needed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, default=Path("runs/promotion"))
    parser.add_argument("--models", type=Path, nargs=2)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--captions", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    people = Population(chosen.work, chosen.models or trained(chosen.work, chosen.threads))
    found = measure(people, chosen.trials, chosen.captions or people.tests)
    shutil.rmtree(people.scratch)
    if chosen.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:70} {value}")


if __name__ == "__main__":
    main()
