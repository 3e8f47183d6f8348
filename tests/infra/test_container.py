"""`infra/Containerfile` without an engine."""

from __future__ import annotations

import re

import infra_files
from dockerfile_parse import DockerfileParser

ROOT = infra_files.ROOT


def instructions():
    with (infra_files.INFRA / "Containerfile").open("rb") as file:
        parser = DockerfileParser(fileobj=file)
        found = parser.structure
    return [(one["instruction"], one["value"]) for one in found]


def values_of(name):
    return [value for instruction, value in instructions() if instruction == name]


def test_it_installs_as_the_makefile_does():
    """torch first, then the lock without dependencies, then the project, in the same words."""
    made = re.findall(
        r"\$\(BIN\)/pip install --disable-pip-version-check --quiet (.*)",
        (ROOT / "Makefile").read_text(),
    )
    wanted = [line.replace("$(TORCH)", "${TORCH}").strip() for line in made]
    runs = " ".join(values_of("RUN"))
    found = re.findall(r"\.venv/bin/pip install --quiet (.*?)(?= && | \.venv| groupadd|$)", runs)
    assert [line.strip() for line in found] == wanted
    (default,) = [v for v in values_of("ARG") if v.startswith("TORCH=")]
    pinned = re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert default == f'TORCH="{pinned[1]}"'


def test_it_runs_as_nobody_special():
    """The last user is a number above zero; a health check and the command are there."""
    (user,) = values_of("USER")
    assert all(int(part) > 0 for part in user.split(":"))
    assert values_of("ENTRYPOINT") == ['["sdn"]']
    (check,) = values_of("HEALTHCHECK")
    assert "python -m pipelines.health" in check


def test_only_named_files_reach_it():
    """The context leaves everything out but what the image copies, so no secret can get in."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        word
        for value in values_of("COPY")
        if not value.startswith("--from")
        for word in value.split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in let_in)


def test_it_carries_no_credential():
    """Neither variables nor build arguments are named like secrets."""
    names = re.findall(r"(\w+)=", " ".join([*values_of("ENV"), *values_of("ARG")]))
    assert names
    assert not [name for name in names if re.search("PASSWORD|SECRET|TOKEN|KEY|AUTH", name)]
