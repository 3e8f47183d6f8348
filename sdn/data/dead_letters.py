"""Dead letters: what could not become a sample, kept with its reason until somebody mends it.

A data set lists those of a version in `dead-letters/{number}.jsonl`, a JSON object a line: key,
where, reason; `original` names the file below `dead-letters/originals` that keeps the image as it
came, `record` has the captions, split, labels and box that came with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdn.data.manifest import FileRef
from sdn.data.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sdn.data.files import Files
    from sdn.data.records import DeadLetter

FOLDER = "dead-letters"
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,5}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptLetter:
    """A dead letter as a data set keeps it."""

    key: str
    where: str
    """The file of the source that it came from."""
    reason: str
    """What was expected and what came."""
    original: str | None = None
    """File of the data set with the image as it came."""
    record: dict[str, Any] | None = None
    """What came with the image: captions, split, labels, box."""

    def as_record(self, files: Files) -> Record | None:
        """The record for another try; None where not all of it was kept.

        Raises:
            OSError: the original cannot be read.
        """
        if self.original is None or self.record is None:
            return None
        box = self.record["box"]
        return Record(
            key=self.key,
            image=files.read(self.original),
            captions=tuple(self.record["captions"]),
            split=self.record["split"],
            labels=self.record["labels"],
            where=self.where,
            box=None if box is None else (box[0], box[1], box[2], box[3]),
        )

    def line(self) -> str:
        """As a line of the list."""
        values = {name: getattr(self, name) for name in ("key", "where", "reason")}
        values |= {n: v for n in ("original", "record") if (v := getattr(self, n)) is not None}
        return json.dumps(values, sort_keys=True) + "\n"


class TooManyDeadLetters(ValueError):  # noqa: N818 - named for what it reports
    """More than the failure budget allows; carries the first of them for a table."""

    def __init__(self, text: str, letters: list[KeptLetter]) -> None:
        super().__init__(text)
        self.letters = letters

    def __reduce__(self) -> tuple[type[TooManyDeadLetters], tuple[str, list[KeptLetter]]]:
        """Pickle by both parts."""
        return type(self), (str(self), self.letters)


def keep(files: Files, letter: DeadLetter) -> KeptLetter:
    """Store the original of a dead letter in the data set, and say what to list."""
    original = None
    if letter.image is not None:
        digest = hashlib.sha256(letter.image).hexdigest()[:32]
        found = _EXTENSION.search(letter.where[-6:])
        suffix = found[0].lower() if found and letter.where.endswith(found[0]) else ""
        original = f"{FOLDER}/originals/{digest}{suffix}"
        if not files.exists(original):
            files.write(original, letter.image)
    record = None
    if letter.record is not None:
        names = ("captions", "split", "labels", "box")
        record = {name: getattr(letter.record, name) for name in names}
    return KeptLetter(
        key=letter.key, where=letter.where, reason=letter.reason, original=original, record=record
    )


def write_list(files: Files, number: int, letters: Iterable[KeptLetter]) -> FileRef:
    """Write the list of the version of this number, line by line."""
    name = f"{FOLDER}/{number:04d}.jsonl"
    digest, length = hashlib.sha256(), 0
    with files.writing(name) as out:
        for letter in letters:
            line = letter.line().encode()
            out.write(line)
            digest.update(line)
            length += len(line)
    return FileRef(name=name, bytes=length, sha256=digest.hexdigest())


def read_list(files: Files, listed: FileRef) -> Iterator[KeptLetter]:
    """The dead letters of a version.

    Raises:
        OSError: the list cannot be read.
        ValueError: it is damaged.
    """
    if files.sha256(listed.name) != listed.sha256:
        raise ValueError(f"{files.uri}/{listed.name} is damaged: it has another SHA-256")
    with files.open(listed.name) as lines:
        for line in lines:
            yield KeptLetter(**json.loads(line))
