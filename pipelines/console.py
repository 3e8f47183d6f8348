"""What a person sees in the terminal."""

from __future__ import annotations

import time
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines.report import COLUMNS, SHORT, plain, short_rows
from pipelines.run import STARTING
from pipelines.search_tables import told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pipelines.run import Run


_LINE_EVERY_S = 60.0


class Display:
    """Progress and results on one console."""

    def __init__(self, *, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, soft_wrap=True, markup=False)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, float, str], None]]:
        """A bar a stage; yields what to call with (stage, share, text or "" for the last one).

        In a log, where there is no terminal: a stage's first and last word, and one a minute.
        """
        if not self.console.is_terminal:
            with self._lines() as show_line:
                yield show_line
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.console, refresh_per_second=2) as bars:
            tasks: dict[str, Any] = {}

            def show(stage: str, share: float, text: str) -> None:
                for name, task in tasks.items():
                    if name != stage and not bars.tasks[task].finished:
                        bars.update(task, completed=1.0)
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage.replace("_", " "), total=1.0, text="")
                said = _said(share, text, bars.tasks[tasks[stage]].fields["text"])
                bars.update(tasks[stage], completed=min(share, 1.0), text=said)

            yield show

    @contextmanager
    def _lines(self) -> Iterator[Callable[[str, float, str], None]]:
        began = time.monotonic()
        told_at: dict[str, float] = {}
        texts: dict[str, str] = {}
        current = waiting = ""

        def flush() -> None:
            nonlocal waiting
            if waiting:
                self.console.print(waiting.rstrip(), highlight=False)
            waiting = ""

        def show(stage: str, share: float, text: str) -> None:
            nonlocal current, waiting
            if stage != current:
                flush()
                current = stage
            now = time.monotonic()
            texts[stage] = _said(share, text, texts.get(stage, ""))
            name = stage.replace("_", " ")
            waiting = f"{now - began:6.0f} s  {name:<10} {min(share, 1.0):4.0%}  {texts[stage]}"
            if now - told_at.get(stage, -inf) >= _LINE_EVERY_S:
                told_at[stage] = now
                flush()

        try:
            yield show
        finally:
            flush()

    def stages(self, stages: Mapping[str, dict[str, Any]], total_s: float) -> None:
        """Each stage, its share of the time, and where its result lies."""
        table = Table(title="Stages")
        for heading in ("stage", "seconds", "share", "", "result in the store"):
            number = heading in ("seconds", "share")
            # Folded rather than cut: the name of a search is what --weights-from takes.
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        rest = total_s
        for name, done in stages.items():
            seconds = done["seconds"] if done["fresh"] else 0.0
            rest -= seconds
            table.add_row(
                name.replace("_", " "),
                f"{seconds:.1f}",
                f"{seconds / max(total_s, 1e-9):.0%}",
                done["note"],
                done["folder"],
            )
        table.add_row("start, tracking", f"{rest:.1f}", f"{rest / max(total_s, 1e-9):.0%}", "", "")
        self.console.print(table)

    def scores(self, found: Mapping[str, Any]) -> None:
        """The scores of each row, with floors, ceiling and what needs no model beside them.

        Args:
            found: `scores`, `captions`, `how_measured` and `withheld` of an evaluation.
        """
        table = Table(
            title=f"Scores on {found['captions']} test captions", box=SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("", max_width=26)
        for score in SHORT:
            heading = COLUMNS[score].heading.replace(", ", "\n").replace("median ", "median\n")
            table.add_column(heading.replace("caption ", "caption\n"), justify="right")
        for name, cells in short_rows(found["scores"]):
            table.add_row(name, *(text.replace(" (", "\n(") for text in cells))
        self.console.print(table)
        self.console.print(found["how_measured"])
        for reason in found["withheld"]:
            self.console.print(f"withheld: {reason}")

    def plan(self, run: Run) -> dict[str, Any]:
        """The resolved config, and whether the first stage would do any work."""
        from pipelines.preparing import prepare_stage
        from sdn.config import to_dict

        config = to_dict(run.config)
        stage = prepare_stage(run.config.data, run.settings)
        done = run.store.done(stage.folder) is not None
        self.console.print_json(data=config)
        self.console.print(f"store: {run.store.uri}")
        state = "already done" if done else "would be made"
        self.console.print(f"data set {stage.folder}: {state}; nothing was changed")
        return {"config": config, "store": run.store.uri, "prepared": done}

    def search(self, found: dict[str, Any]) -> None:
        """What the search found and how it is used again, or whose weights were taken."""
        searched = found["stages"]["search"]
        if found["weights_from"]:
            weights = found["stages"]["stage_two"]["result"]["weights"]
            self.console.print(f"search: none; weights of {found['weights_from']}: {weights}")
        elif searched["result"]["trials"]:
            self.console.print(f"search: {told(searched['result'])}")
            name = searched["folder"].rpartition("/")[2]
            command = f"sdn run {found['recipe']} --weights-from {name}{found['store_option']}"
            self.console.print(f"its weights again: {command}")

    def result(self, found: dict[str, Any]) -> None:
        """The end of a run: stages, scores, where everything is and what to do next."""
        say = self.console.print
        if found["nothing_to_do"]:
            say("nothing to do: every stage was done already")
        self.stages(found["stages"], found["seconds"])
        self.scores(found)
        model = found["model"]
        say(
            "fixed cost (what does not compute, within the stages, too: starting Ray, flow and "
            f"tracking): {found['fixed_s']:.0f} s"
        )
        self.search(found)
        data = found["stages"]["prepare"]["result"]
        if data["dead_letters"]:
            say(
                f"{data['dead_letters']} images could not be used: sdn data letters "
                f"{found['data_place']}"
            )
        for name, figures in found["figures"].items():
            match, kid = figures["caption match"], figures["KID"]
            share = f"{match['value']:.1%}" if match.get("value") is not None else "withheld"
            say(f"{name}: caption match {share}, KID {_plain(kid.get('value'))}")
        for name in earlier_and_better(found["figures"]):
            say(
                f"warning: the images of {name} are nearer to real ones, beyond chance, than those "
                "of the last stage, which is the model: train the later stages for longer, or on "
                "more images"
            )
        say(f"top 1 on {found['test_is']}: {found['headline']:.1%}")
        role = "champion" if model["champion"] else "challenger"
        say(f"model: {model['name']} version {model['version']} ({role}: {model['reason']})")
        say(f"contact sheet: {found['contact_sheet']}")
        say(f"report: {found['report']}")
        if found["tracking_uri"].startswith("http"):
            say(f"runs and models: {found['tracking_uri']}")
        else:
            say(f"runs, models ({found['tracking_uri']}) and flows: sdn ui{found['store_option']}")
        named = "" if model["champion"] else f" --model {model['uri']}"
        say(f'generate: sdn generate "{found["example"]}"{named}{found["store_option"]}')


def _said(share: float, text: str, last: str) -> str:
    """What a stage says: its last word where there is no new one, at its end not "starting"."""
    said = text or last
    return "done" if share >= 1 and said == STARTING else said


def earlier_and_better(figures: Mapping[str, Any]) -> list[str]:
    """Models before the last whose KID is below the last one's, intervals apart."""
    *earlier, last = figures
    least = figures[last]["KID"].get("low")
    if least is None:
        return []
    highs = {name: figures[name]["KID"].get("high") for name in earlier}
    return [name for name, high in highs.items() if high is not None and high < least]


def _plain(value: float | None) -> str:
    return "withheld" if value is None else plain(value)
