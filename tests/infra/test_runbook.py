"""The texts that are read in trouble name commands that there are."""

from __future__ import annotations

import re
import shlex

import infra_files
import pytest
from sdn_commands import refusal

TEXTS = [
    infra_files.INFRA / "README.md",
    *sorted((infra_files.ROOT / "pipelines" / "diagnosis").glob("*.py")),
]
NAMED = re.compile("it only shows help|Missing ")
"""What `sdn` says where a text names a command without its arguments."""


def commands(text):
    """Each `sdn ...` that is no pattern, without what a shell takes out of it."""
    shown = re.findall(r"`sdn ([a-z][^`{]*)`", text)
    lines = [*shown, *re.findall(r"^sdn (.*)$", text, re.MULTILINE)]
    for line in lines:
        words = shlex.split(line, comments=True)
        # PART and its like stand for something.
        if "PART" not in words:
            yield words


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_a_command_that_is_named_is_there(path):
    """Each command of `sdn` in the runbook and in the doctor's remedies is one that it takes."""
    wrong = {" ".join(words): refusal(words) for words in commands(path.read_text())}
    assert {line: why for line, why in wrong.items() if why and not NAMED.match(why)} == {}


def test_the_runbook_names_commands():
    """The test above looks at something."""
    assert len(list(commands(TEXTS[0].read_text()))) > 10
