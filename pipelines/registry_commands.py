"""`sdn promote` and `sdn rollback`: who is the champion of the registry, from the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.terminal import JsonOption, StoreOption, answer, expected_errors, quiet, say


def rollback(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="Registered model, such as sdn-openmoji [default: that of the latest champion].",
            show_default=False,
        ),
    ] = "",
    store: StoreOption = None,
    reason: Annotated[
        str, typer.Option("--reason", help="Kept with the version that is rolled back from.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Make the champion before the champion again; once more, and that is undone."""
    with expected_errors():
        quiet()
        # Not through Prefect: this has to work on a day on which other things do not.
        from pipelines.rolling_back import roll_back
        from pipelines.settings import Settings

        settings = Settings() if store is None else Settings(store=store)
        found = roll_back(settings, name, reason)
        if not as_json:
            files = "its files are as registered" if found["sha256"] else "its files are there"
            say(
                f"{found['name']}: version {found['after']} is the champion again, in place of "
                f"version {found['before']} ({found['seconds']} s); {files}. The same command once "
                "more undoes it"
            )
        answer(found, as_json=as_json)


def promote(
    version: Annotated[int, typer.Argument(min=1, help="Number of the version.")],
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="Registered model, such as sdn-openmoji [default: that of the latest champion].",
            show_default=False,
        ),
    ] = "",
    store: StoreOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overrule the paired test; needs --reason.")
    ] = False,
    reason: Annotated[
        str, typer.Option("--reason", help="Kept in the log of champions and with the version.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion if it is better beyond chance; `sdn rollback` undoes it."""
    with expected_errors():
        quiet()
        from pipelines.console import Display
        from pipelines.promoting import open_promotion, promote

        with Display(to_stderr=as_json).progress() as progress:
            found = promote(
                open_promotion(name, version, store, progress), force=force, reason=reason
            )
        told = "is the champion" if found["champion"] else "is not promoted"
        say(f"{found['name']}: version {version} {told}: {found['reason']}", error=as_json)
        answer(found, as_json=as_json)
        if not found["champion"]:
            raise typer.Exit(1)
