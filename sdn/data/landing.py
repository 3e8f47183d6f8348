"""What has arrived at a landing place and may be taken: new, whole, and no longer written to.

A landing place is a folder or bucket into which others put images, tables or tars, at any time and
in any order; nothing in it is ever changed or deleted here. A file counts as arrived

- once its length and time of change have been the same for `settle_s` seconds (a server's objects
  appear whole, so that theirs need no such time),
- if it does not look cut off, as an upload that stands still does, or has looked so for an hour: it
  is read then, and becomes a dead letter if it is no image,
- and if what belongs to it is there: the caption of an image, the image of a caption.

All others wait for the next look and are told by name. Names that programs give to what they are
still writing (`.part`, `.tmp`, `.crdownload`, a `~` at the end, ...) are passed over.
"""

from __future__ import annotations

import hashlib
import re
import time
from array import array
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from sdn.data.files import FileInfo, Files, LocalFolder
from sdn.data.landed import LandedFiles
from sdn.data.sources.folder import IMAGES
from sdn.data.sources.folder_metadata import BadRow, Row, is_table, rows
from sdn.data.sources.parquet import first_absent_image
from sdn.data.wholeness import cut_off

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from numpy.typing import NDArray

    from sdn.config import DataConfig

APPENDABLE = ("folder", "parquet", "tars")
"""Sources whose layout can grow while it is read."""
SHOWN = 100
"""Waiting files that are told by name; the others are counted."""
_PATIENCE_S = 3600.0
_ENDINGS = "part|partial|tmp|temp|crdownload|download|filepart|swp|swx|upload|uploading|lock"
_TEMPORARY = re.compile(rf"\.({_ENDINGS})$|~$|(^|/)(~\$|#)[^/]*$|_\$folder\$$", re.IGNORECASE)
_CARRIERS = {"parquet": (".parquet",), "tars": (".tar", ".tar.gz", ".tgz")}
"""Source -> endings of the files that hold its records."""
_NO_CAPTION = "no caption yet: neither a text file beside it nor a line in a table"
_NO_IMAGE = "its image is not there yet"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file that is left for the next look."""

    name: str
    reason: str


class Marks:
    """Which files were taken, as they were: 16 bytes each of name, length and stamp."""

    def __init__(self, data: bytes = b"") -> None:
        """Args:
        data: as `to_bytes` gave it.

        Raises:
            ValueError: it was cut off.
        """
        if len(data) % 16:
            raise ValueError(f"expected 16 bytes a mark, not {len(data)} bytes in all")
        self._marks: NDArray[np.bytes_] = np.frombuffer(data, "S16")

    def __contains__(self, info: FileInfo) -> bool:
        """Whether this file was taken, and has not changed since."""
        mark = np.array(_mark(info), "S16")[()]  # numpy drops zeros at the end of both
        place = int(np.searchsorted(self._marks, mark))
        return place < len(self._marks) and bool(self._marks[place] == mark)

    def __len__(self) -> int:
        """Number of files."""
        return len(self._marks)

    def with_files(self, infos: Iterable[FileInfo]) -> Marks:
        """These marks and those of more files."""
        found = Marks()
        more = np.array([_mark(info) for info in infos], "S16")
        found._marks = np.unique(np.concatenate([self._marks, more]))
        return found

    def to_bytes(self) -> bytes:
        """For a file."""
        return self._marks.tobytes()


def _mark(info: FileInfo) -> bytes:
    line = f"{info.name}|{info.size}|{info.stamp}".encode(errors="surrogateescape")
    return hashlib.blake2b(line, digest_size=16).digest()


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one look at a landing place has found."""

    files: LandedFiles
    """The place as a source: nothing in it but what may be taken."""
    infos: tuple[FileInfo, ...]
    """The files that are shown there."""
    new: int
    """Images, tables with images, or tars among them."""
    waiting: tuple[Waiting, ...]
    """The first files that are left for the next look."""
    waiting_count: int


@dataclass(frozen=True, kw_only=True)
class Look:
    """How to look at a landing place."""

    settle_s: float = 10.0
    """A file that changed less than so many seconds ago may still be written to."""
    patience_s: float = _PATIENCE_S
    """What looks cut off is taken as it is when it has not changed for so long."""
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    known_faults: Container[str] = frozenset()
    """Places of dead letters (`captions.csv:3`) that are listed already."""


def arrived(files: Files, config: DataConfig, taken: Marks, look: Look) -> Arrival:
    """What is at a landing place and was not taken before.

    Where something changed just now, it looks a second time, `settle_s` later: what has not changed
    in between is taken, all else is left for the next look. So nothing is waited for twice.

    Memory grows with what is new, not with what is there.

    Args:
        files: the landing place.
        config: of the data set that it goes into: its source and the names of its fields.
        taken: what earlier looks have taken.
        look: how.

    Raises:
        ValueError: a source that cannot grow, or a table without the columns it needs.
    """
    if config.source not in APPENDABLE:
        raise ValueError(
            f"the source {config.source!r} cannot grow at a landing place: expected one of "
            f"{', '.join(APPENDABLE)}"
        )
    seen = _Seen(files, taken)
    _settle(files, seen, look)
    _leave_cut_off(files, seen, look)
    if config.source == "folder":
        _pair(files, config, seen, look)
        new = len(seen.images)
    else:
        endings = _CARRIERS[config.source]
        if config.source == "parquet":
            _leave_without_images(files, config, seen, look)
        new = sum(name.lower().endswith(endings) for name in seen.new)
    infos = tuple(seen.new[name] for name in sorted(seen.new))
    return Arrival(
        files=LandedFiles(files, infos, seen.lines),
        infos=infos,
        new=new,
        waiting=tuple(seen.waiting[:SHOWN]),
        waiting_count=len(seen.waiting),
    )


@dataclass
class _Seen:
    """What is known of a landing place while it is looked at."""

    files: Files
    taken: Marks
    new: dict[str, FileInfo] = field(default_factory=dict)
    """Name -> file that was not taken; what is left for later is removed from it."""
    tables: dict[str, FileInfo] = field(default_factory=dict)
    """Tables of captions, taken before or not."""
    images: set[str] = field(default_factory=set)
    waiting: list[Waiting] = field(default_factory=list)
    lines: dict[str, frozenset[int]] = field(default_factory=dict)
    """Table -> numbers of its lines that are about new files, from 1, and of its heading."""

    def __post_init__(self) -> None:
        # Of names that were taken only a number each is kept: tables name all of them again.
        names = array("q")
        for info in landed(self.files):
            names.append(hash(info.name))
            if is_table(info.name):
                self.tables[info.name] = info
            if info not in self.taken:
                self.new[info.name] = info
        self._names = np.sort(np.frombuffer(names, np.int64)) if names else np.zeros(0, np.int64)

    def is_there(self, name: str) -> bool:
        """Whether the place has a file of this name."""
        place = int(np.searchsorted(self._names, hash(name)))
        return place < len(self._names) and bool(self._names[place] == hash(name))

    def leave(self, name: str, reason: str) -> None:
        """Leave a file for the next look."""
        self.new.pop(name, None)
        self.tables.pop(name, None)
        self.waiting.append(Waiting(name, reason))


def landed(files: Files) -> Iterator[FileInfo]:
    """All files of a landing place but those whose names say that they are not finished."""
    return (info for info in files.walk() if not _TEMPORARY.search(info.name))


def _settle(files: Files, seen: _Seen, look: Look) -> None:
    """Leave what is empty or still changes."""
    if isinstance(files, LocalFolder):
        now = look.clock()
        # A clock that is behind the file system's makes ages negative: those are new, too.
        fresh = {n: i for n, i in seen.new.items() if _age_s(i, now) < look.settle_s}
        if fresh:
            look.sleep(look.settle_s)
            again = {info.name: info for info in landed(files) if info.name in fresh}
            for name, info in fresh.items():
                if again.get(name) != info:
                    seen.leave(name, f"still changes: it is not the same after {look.settle_s:g} s")
    for name in [name for name, info in seen.new.items() if not info.size]:
        seen.leave(name, "is empty yet")


def _age_s(info: FileInfo, now: float) -> float:
    """Seconds since a file of a folder was changed."""
    return now - int(info.stamp) / 1e9


def _leave_cut_off(files: Files, seen: _Seen, look: Look) -> None:
    """Leave what an upload has not written to its end; an object of a server is whole."""
    if not isinstance(files, LocalFolder):
        return
    now = look.clock()
    for name, info in list(seen.new.items()):
        if _age_s(info, now) >= look.patience_s:
            continue
        try:
            reason = cut_off(files, info)
        except FileNotFoundError:
            reason = "was taken away while it was looked at"
        if reason is not None:
            seen.leave(name, reason)


def _leave_without_images(files: Files, config: DataConfig, seen: _Seen, look: Look) -> None:
    """Leave tables that name files which are not there yet."""
    now, is_local = look.clock(), isinstance(files, LocalFolder)
    for name, info in list(seen.new.items()):
        if not name.lower().endswith(_CARRIERS["parquet"]) or (
            is_local and _age_s(info, now) >= look.patience_s
        ):
            continue
        absent = first_absent_image(config, files, name)
        if absent is not None:
            seen.leave(name, f"names images that are not there yet, such as {absent}")


def _pair(files: Files, config: DataConfig, seen: _Seen, look: Look) -> None:
    """Leave images without captions and captions without images, of a folder."""
    captioned = _read_tables(files, config, seen, look)
    seen.images = {name for name in seen.new if _is_image(name)} | captioned
    texts = {_text_of(name): name for name in seen.new if _is_text(name)}
    lonely = {_text_of(name) for name in seen.images - captioned} - set(texts)
    lonely |= set(texts) - {_text_of(name) for name in seen.images}
    # The other half may have been taken before, when this one was another.
    for info in landed(files) if lonely else ():
        if info.name not in seen.new and info in seen.taken and _text_of(info.name) in lonely:
            if _is_image(info.name):
                seen.images.add(info.name)
            elif _is_text(info.name):
                texts[_text_of(info.name)] = info.name
            else:
                continue
            seen.new[info.name] = info
    with_image = {_text_of(name) for name in seen.images}
    for name in sorted(seen.images - captioned):
        if _text_of(name) not in texts:
            seen.images.discard(name)
            seen.leave(name, _NO_CAPTION)
    for text, name in sorted(texts.items()):
        if text not in with_image:
            seen.leave(name, _NO_IMAGE)
    if seen.images:
        seen.new |= seen.tables


def _read_tables(files: Files, config: DataConfig, seen: _Seen, look: Look) -> set[str]:
    """The new files that tables have captions for; lines about others are passed over."""
    captioned: set[str] = set()
    for table in list(seen.tables):
        kept: list[range] = []
        start, is_kept = 1, True  # the heading of a table with columns
        for row in rows(files, table, config):
            number = int(row.where.rpartition(":")[2])
            if is_kept:
                kept.append(range(start, number))  # a row may have several lines
            start, is_kept = number, _is_new(row, files, seen, look)
            if is_kept and isinstance(row, Row) and row.captions:
                captioned.add(row.path)
        if is_kept:
            kept.append(range(start, _line_count(files, table) + 1))
        seen.lines[table] = frozenset(number for lines in kept for number in lines)
    return captioned


def _is_new(row: Row | BadRow, files: Files, seen: _Seen, look: Look) -> bool:
    """Whether a line of a table is about a new file, or is a fault that is not listed yet."""
    if isinstance(row, Row):
        if not seen.is_there(row.path):
            seen.waiting.append(Waiting(row.where, f"there is no {row.path} yet"))
        return row.path in seen.new
    if row.where in look.known_faults:
        return False
    table, _, number = row.where.rpartition(":")
    if _ends_with_a_line(files, table) or int(number) < _line_count(files, table):
        return True
    seen.waiting.append(Waiting(row.where, "its last line is not whole yet"))
    return False


def _ends_with_a_line(files: Files, table: str) -> bool:
    return files.read_range(table, files.size(table) - 1, 1) in {b"\n", b"\r"}


def _line_count(files: Files, table: str) -> int:
    with files.open(table) as lines:
        return sum(1 for _ in lines)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGES


def _is_text(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() == ".txt"


def _text_of(name: str) -> str:
    """Where the captions of an image lie, if they lie beside it."""
    return str(PurePosixPath(name).with_suffix(".txt"))
