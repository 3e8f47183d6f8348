"""What each part of the method gives: the same run with one thing changed, scored alike.

    python tests/benchmarks/ablation.py --store RUNS [--recipe openmoji] [--arms "full,pixels only"]
        [--seeds 0,1,2] [--set KEY=VALUE]... [--page FOLDER] [--rows N] [--real]

Each arm is `sdn run` with changes, in one store, so that what arms share is made once; take one of
its own, for arms are registered like any run. What is done is kept in RUNS/ablation.jsonl and not
done again. `--page` writes a page with the table and one sheet, a column an arm; true images are on
it with `--real` alone, for data that may be shown. Weights that a search found before, at full
length against others: `loss_weights.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.report import COLUMNS, cell
from sdn.checking import check_config
from sdn.config import to_dict, with_overrides
from sdn.recipes import recipe

if TYPE_CHECKING:
    from sdn.config import RunConfig

STAGES = ("one", "two", "three")
GROUPS = ("image", "conv1", "conv2", "conv3", "conv4", "conv5")


def all_ones(scale: str) -> dict[str, str]:
    """Changes that give each group of taps the weight 1, on activations of this scale."""
    ones = {f"stage_{n}.weights.{group}": "1" for n in STAGES for group in GROUPS}
    return ones | {f"stage_{n}.scale": scale for n in STAGES}


def without(*groups: str) -> dict[str, str]:
    """Changes that leave groups of taps out of the distances of all stages."""
    return {f"stage_{n}.weights.{group}": "0" for n in STAGES for group in groups}


NOISE = {"student.noise": "32", "stage_three.diversity": "0.03"}

NO_WEIGHTS = {"teacher.weights": "null", "teacher.sha256": "null"}


def arms(config: RunConfig) -> dict[str, dict[str, str]]:
    """Name -> changes of the recipe; all arms train as many images as its stages together.

    But for what a search trains beside them, which is not in its table's seconds either.
    """
    student, teacher = config.student, config.teacher
    one, two, three = (
        stage.epochs for stage in (config.stage_one, config.stage_two, config.stage_three)
    )
    no_critics = {"stage_two.epochs": str(two + three), "stage_three.epochs": "0"}
    # What stage three takes is taken from stage two.
    third = {"stage_two.epochs": str(two * 2 / 3), "stage_three.epochs": str(two / 3)}
    nothing_added = {
        "student.noise": "0",
        "student.condition": "top",
        "student.leak": "0",
        "student.chroma": "1",
        "student.width": "1",
        "stage_three.diversity": "0",
    }
    raw = all_ones("raw")
    # mean-255 is what files of VGG's authors need; it says nothing of weights that are drawn.
    convention = {"teacher.convention": "imagenet"} if teacher.convention == "mean-255" else {}
    no_weights = NO_WEIGHTS | convention
    # Critics read high taps, too: arms about what distances reach have none.
    alone = no_critics | {"stage_three.diversity": "0"} if three else {}
    total = {"stage_three.epochs": "0", "stage_three.diversity": "0"}
    whole = str(one + two + three)
    return {
        "full": {},
        "stage one only": total | {"stage_one.epochs": whole, "stage_two.epochs": "0"},
        "stage two only": total | {"stage_one.epochs": "0", "stage_two.epochs": whole},
        "pixels only": without("conv1", "conv2", "conv3", "conv4", "conv5") | alone,
        "low taps only": without("conv3", "conv4", "conv5") | alone,
        "high taps only": without("image", "conv1", "conv2") | alone,
        "all ones raw": raw,
        "all ones relative": all_ones("relative"),
        "as the paper": raw | nothing_added | no_critics,
        # Any trial may come to full length, where alone its weights can replace the recipe's own.
        "searched weights": {"search.trials": "8", "search.rerun_level": "1"},
        "L2": {f"stage_{n}.distance": "l2" for n in STAGES},
        "constant rate": {f"stage_{n}.schedule": "constant" for n in STAGES},
        "random teacher": {"teacher.epochs": "0"} | (no_weights if teacher.weights else {}),
        **({"fitted teacher": no_weights} if teacher.weights else {}),
        "sentence encoder": {"captions.encoder": "sentence"},
        **(
            {"text at the top": {"student.condition": "top"}}
            if student.condition == "levels"
            else {"levels": {"student.condition": "levels"}}
        ),
        **(
            {"no leak": {"student.leak": "0"}}
            if student.leak
            else {"leak": {"student.leak": "0.1"}}
        ),
        **(
            {"fine chroma": {"student.chroma": "1"}}
            if student.chroma > 1
            else {"coarse chroma": {"student.chroma": "4"}}
        ),
        "no average": {f"stage_{n}.average_share": "0" for n in STAGES},
        "half the width": {"student.width": str(student.width / 2)},
        **(
            {
                "no critics": alone,
                "no noise": {"student.noise": "0", "stage_three.diversity": "0"},
                "augmented": {"stage_three.augment": "differentiable"},
            }
            if three
            else {
                "critics": third,
                "critics with noise": third | NOISE,
                "critics with levels": third | {"student.condition": "levels"},
                "critics with noise and levels": third | NOISE | {"student.condition": "levels"},
                "critics with augmentation": third | {"stage_three.augment": "differentiable"},
            }
        ),
    }


def run(name: str, store: Path, changes: dict[str, str], which: str) -> dict[str, object]:
    """One arm with one seed: its scores, where its model lies, and what its training took."""
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    sdn = Path(sys.executable).with_name("sdn")
    command = [str(sdn), "run", which, "--store", str(store)]
    done = subprocess.run(
        [*command, "--json", *words], check=True, stdout=subprocess.PIPE, text=True
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    last = list(answer["figures"])[-1]
    trained = {k: v for k, v in answer["stages"].items() if k.startswith("stage_")}
    final = [*trained.values()][-1]
    longest = max((one["result"] for one in trained.values()), key=lambda one: one["images_seen"])
    return {
        "recipe": which,
        "arm": name,
        "changes": changes,
        "scores": answer["scores"][last],
        "floors": {
            name: found
            for name, found in answer["scores"].items()
            if name not in answer["figures"] and not name.startswith("champion")
        },
        "model": final["folder"],
        "rate": longest["images_seen"] / longest["computing_s"],
        "data": answer["stages"]["prepare"]["folder"],
        "seconds": sum(stage["seconds"] for stage in trained.values()),
        "captions": answer["captions"],
    }


SHOWN = (
    "kid_error",
    "fid_error",
    "r_precision_score",
    "pixels/top1_score",
    "pixels/top5_score",
    "pixels/median_rank",
    "diversity_score",
    "caption_diversity_score",
)


def told(found: list[dict[str, object]]) -> list[str]:
    """A table in Markdown: a score with its interval, or the mean over the seeds and each value.

    Below the arms what needs no model: real images, the true image blurred, copies.
    """
    shown = [key for key in SHOWN if any(_cell(key, [one["scores"]]) for one in found)]
    headings = [COLUMNS[key].heading for key in shown]
    lines = [
        f"| arm | seeds | {' | '.join(headings)} | s of training | images/s, longest stage |",
        "|---|---:|" + "---:|" * (len(shown) + 2),
    ]
    for name in dict.fromkeys(one["arm"] for one in found):
        rows = [one for one in found if one["arm"] == name]
        cells = [_cell(key, [row["scores"] for row in rows]) for key in shown]
        seconds = statistics.mean(row["seconds"] for row in rows)
        rate = statistics.mean(row["rate"] for row in rows)
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} | {seconds:.0f} | {rate:.0f} |")
    for name, scores in found[0]["floors"].items() if found else ():
        cells = [_cell(key, [scores]) for key in shown]
        lines.append(f"| *{name}* | | {' | '.join(cells)} | | |")
    return lines


def _cell(key: str, scores: list[dict[str, dict[str, float]]]) -> str:
    there = [one for one in scores if one.get(key, {}).get("value") is not None]
    if not there:
        return ""
    if len(there) == 1:
        return cell(there[0], key)
    values = [one[key]["value"] for one in there]
    mean = cell({key: {"value": statistics.mean(values)}}, key)
    return f"{mean} ({', '.join(cell(one, key, bare=True) for one in there)})"


def sheet(
    folder: Path, store: Path, found: list[dict[str, object]], rows: int, *, real: bool
) -> None:
    """One picture: a column an arm (its first seed), a row a test caption."""
    from sdn.data.loader import load_split
    from sdn.sampling import open_synthesizer
    from sdn.sheets import contact_sheet

    split = load_split(store / str(found[0]["data"]), "test")
    numbers = [i * len(split.captions) // rows for i in range(rows)]
    captions = [split.captions[n][0] for n in numbers]
    columns = {"real": split.pixels[numbers]} if real else {}
    for one in found:
        if one["arm"] not in columns:
            model = open_synthesizer(store / str(one["model"]))
            columns[str(one["arm"])] = model.of_data(captions)
    contact_sheet(columns, captions, across=1, side=96).save(folder / "ablation.png")


def _key(one: dict[str, object]) -> str:
    # By the whole config: with the changes alone an arm would count as done when its recipe is not
    # what it was.
    return json.dumps([one["arm"], one.get("config")], sort_keys=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--recipe", default="openmoji")
    parser.add_argument("--arms", default="")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--page", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="captions on the sheet")
    parser.add_argument("--real", action="store_true")
    given = parser.parse_args()
    common = dict(change.split("=", 1) for change in given.set)
    config = with_overrides(recipe(given.recipe), common)
    every = arms(config)
    wanted = [name.strip() for name in given.arms.split(",") if name.strip()] or list(every)
    if unknown := [name for name in wanted if name not in every]:
        parser.error(f"no arm {', '.join(unknown)}; there are: {'; '.join(every)}")
    kept = given.store / "ablation.jsonl"
    given.store.mkdir(parents=True, exist_ok=True)
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {_key(one): one for one in map(json.loads, lines)}
    found, planned = [], []
    for seed in given.seeds.split(","):
        for name in wanted:
            # No search: its values would differ from arm to arm.
            changes = {"search.trials": "0"} | common | every[name]
            changes |= {f"stage_{n}.seed": seed for n in STAGES}
            # What cannot work is refused here, before any arm is trained.
            resolved = with_overrides(recipe(given.recipe), changes)
            check_config(resolved)
            planned.append((name, changes, to_dict(resolved)))
    for name, changes, whole in planned:
        one = done.get(_key({"arm": name, "config": whole}))
        if one is None:
            one = run(name, given.store, changes, given.recipe) | {"config": whole}
            with kept.open("a") as file:
                file.write(json.dumps(one) + "\n")
            print("\n".join(told([one])), flush=True)
        found.append(one)
    print("\n".join(told(found)))
    if given.page is not None:
        given.page.mkdir(parents=True, exist_ok=True)
        sheet(given.page, given.store, found, given.rows, real=given.real)
        about = f"`{given.recipe}`, {found[0]['captions']} test captions"
        (given.page / "ablation.md").write_text("\n".join([f"# {about}", "", *told(found), ""]))
        (given.page / "ablation.json").write_text(json.dumps([to_dict(config), found]))


if __name__ == "__main__":
    main()
