"""`python -m sdn`: the stages on one device with torch alone, from folder to folder.

    python -m sdn all --recipe openmoji --work work        every stage, one after another
    python -m sdn stage-two --recipe openmoji --work work  one of them
    python -m sdn generate "a red bird" --work work

Each stage has a folder of its name below `--work` and reads those of earlier ones. A finished stage
is not done again, an interrupted one goes on from its newest checkpoint, and a folder made from
another config or other inputs is refused.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from sdn import METHOD_VERSION
from sdn.checking import check_config
from sdn.config import to_key, with_overrides
from sdn.data.files import LocalFolder
from sdn.data.manifest import MANIFEST
from sdn.memory import keep_freed_memory
from sdn.ranks import Rank
from sdn.recipes import RECIPES, recipe
from sdn.sampling import ENCODER, STUDENT
from sdn.stage_run import TEACHER
from sdn.teacher import file_digest
from sdn.training import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdn.checkpoint import Checkpoint
    from sdn.config import RunConfig
    from sdn.fitting import Fitter
    from sdn.running import Opener
    from sdn.stages import StageName
    from sdn.training import StepReport

RESULTS = {
    "prepare": MANIFEST,
    "teacher": TEACHER,
    "captions": ENCODER,
    "stage-one": STUDENT,
    "stage-two": STUDENT,
    "stage-three": STUDENT,
}
"""Step -> the file by whose digest later steps know its result."""
DONE = "done"
"""Empty file in the folder of a finished step."""
STEPS = tuple(RESULTS)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do one step or all of them."""
    parser = argparse.ArgumentParser(prog="python -m sdn", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("step", choices=[*STEPS, "all", "generate"])
    parser.add_argument("captions", nargs="*", help="for generate: what to draw")
    parser.add_argument("--recipe", default="openmoji", choices=list(RECIPES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0, help="for generate, of models with noise")
    parser.add_argument("--noise-scale", type=float, help="for generate, of models with noise")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of all results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=available_cores())
    # Intermixed: captions may stand after options too.
    chosen = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    try:
        config = with_overrides(recipe(chosen.recipe), _changes(chosen.set))
        check_config(config)
        if chosen.step == "generate":
            generate(chosen.captions, chosen.work, chosen.seed, chosen.noise_scale)
            return
        every = [step for step in STEPS if step != "stage-three" or config.stage_three.epochs]
        for step in every if chosen.step == "all" else (chosen.step,):
            run_step(step, config, chosen.work, torch.device(chosen.device))
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def run_step(step: str, config: RunConfig, work: Path, device: torch.device) -> None:
    """Do one step into the folder of its name below `work`.

    Raises:
        ValueError: the folder was made from another config or other inputs.
        FileNotFoundError: an earlier step has not been done.
    """
    folder = work / step
    print(f"{step}: {folder}", file=sys.stderr)
    _claim(step, config, work)
    if (folder / DONE).exists():
        print(f"{step}: already done", file=sys.stderr)
        return
    if step == "prepare":
        _prepare(config, folder)
    elif step == "teacher":
        from sdn.fitting import write_teacher

        fit = _fitted(folder, device)
        print(write_teacher(folder, work / "prepare", config.teacher, fit=fit, report=_say))
    elif step == "captions":
        from sdn.fitting import write_captions

        data, teacher, fit = work / "prepare", work / "teacher", _fitted(folder, device)
        print(write_captions(folder, data, teacher, config.captions, fit=fit, report=_say))
    else:
        _distil(cast("StageName", step.replace("-", "_")), config, work, device)
    (folder / DONE).touch()


def _claim(step: str, config: RunConfig, work: Path) -> None:
    """Note what a step's folder is made from; refuse one that was made from something else."""
    own = {"prepare": "data"}.get(step, step.replace("-", "_"))
    wanted: dict[str, Any] = {
        "config": to_key(getattr(config, own)),
        "method": METHOD_VERSION,
    }
    if step.startswith("stage"):
        wanted |= {"student": to_key(config.student), "lanes": config.lanes}
    for earlier in STEPS[: STEPS.index(step)]:
        result = work / earlier / RESULTS[earlier]
        if not ((result.parent / DONE).exists() and result.exists()):
            raise FileNotFoundError(f"{step} needs {result.parent}: run `{earlier}` or `all` first")
        wanted[earlier] = file_digest(result)
    claim = work / step / "made-from.json"
    if claim.exists() and json.loads(claim.read_text()) != wanted:
        raise ValueError(
            f"{work / step} was made from another config or other inputs, or by another version of "
            f"this program (see {claim}): delete it to make it anew, or name another --work"
        )
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text(json.dumps(wanted, indent=2))


def _changes(entries: list[str]) -> dict[str, str]:
    wrong = [entry for entry in entries if "=" not in entry]
    if wrong:
        raise ValueError(f"expected --set key=value, not {wrong[0]!r}")
    return dict(entry.split("=", 1) for entry in entries)


def _prepare(config: RunConfig, folder: Path) -> None:
    from sdn.data.files import LocalFolder
    from sdn.data.shards import Writing, write_dataset
    from sdn.data.sources import attribution, open_source, partitions
    from sdn.data.sources.fingerprint import fingerprint

    data, source = config.data, open_source(config.data)
    writing = Writing(
        config=data,
        attribution=attribution(data.source),
        fingerprint=fingerprint(data, source),
        report=lambda step, done, total: print(f"{done} {step}", file=sys.stderr),
    )
    write_dataset(partitions(data, source), LocalFolder(folder), writing)


def _distil(name: StageName, config: RunConfig, work: Path, device: torch.device) -> None:
    from sdn.progress_sheet import sheet_of
    from sdn.stage_run import StageInputs, open_stage, write_model

    folder = work / name.replace("_", "-")
    inputs = StageInputs(
        data=work / "prepare",
        teacher=work / "teacher",
        captions=work / "captions",
        start={"stage_two": work / "stage-one", "stage_three": work / "stage-two"}.get(name),
    )
    last = _trained(
        lambda resume, rank: open_stage(name, config, inputs, resume, rank),
        folder,
        device,
        sheet_of(config, inputs),
    )
    write_model(folder, config, inputs.captions, last.weights())


def _fitted(folder: Path, device: torch.device) -> Fitter:
    return lambda opener: _trained(opener, folder, device).weights()


def _trained(
    opener: Opener,
    folder: Path,
    device: torch.device,
    sheet: Callable[[Checkpoint], bytes] | None = None,
) -> Checkpoint:
    """The last checkpoint of a training in this process, gone on with where it was.

    SIGTERM and Ctrl-C end it after one more checkpoint.
    """
    from sdn.running import run_recorded

    asked = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        trainee, ended = run_recorded(
            opener,
            LocalFolder(folder / "training"),
            rank=Rank(device=device),
            report=_progress,
            stopping=asked.is_set,
            say=lambda text: print(text, file=sys.stderr),
            sheet=sheet,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not ended:
        sys.exit(f"stopped after step {trainee.step}; the same command goes on from there")
    return trainee.checkpoint()


def _progress(step: StepReport) -> None:
    total = step.losses["loss/total"]
    _say(step.step / step.steps, f"loss {total:.4f}, {step.images_per_s:.0f} images/s")


def generate(
    captions: list[str], work: Path, seed: int = 0, noise_scale: float | None = None
) -> None:
    """Draw captions with the model of the last stage that there is.

    Raises:
        ValueError: no captions, or one that no picture can be made of.
        FileNotFoundError: no stage has finished.
    """
    from sdn.sampling import encode_png, open_synthesizer

    if not captions:
        raise ValueError('nothing to draw: give captions, as in `generate "a red bird"`')
    finished = [work / step for step in ("stage-three", "stage-two", "stage-one")]
    folder = next((path for path in finished if (path / STUDENT).is_file()), finished[0])
    drawn = open_synthesizer(folder)(captions, seed=seed, noise_scale=noise_scale)
    for caption, pixels in zip(captions, drawn, strict=True):
        name = "-".join(caption.lower().split())[:60].replace("/", "-")
        of_seed = f"-seed-{seed}" if seed else ""
        of_scale = "" if noise_scale is None else f"-noise-{noise_scale}"
        path = work / f"{name}{of_seed}{of_scale}.png"
        path.write_bytes(encode_png(pixels))
        print(path)


def _say(share: float, text: str) -> None:
    print(f"{share:6.1%} {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
