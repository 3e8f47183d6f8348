"""The entries of a source on disk: sorted, joined and counted without holding them in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNSAFE = re.compile(r"[\s./\\\x00-\x1f\x7f\ud800-\udfff]")
"""What a key must not hold (`sdn.data.preparation`), and bytes of names that are not UTF-8."""
_HASHED = re.compile(r"-[0-9a-f]{16}$")
"""The end of a key with a hash; a path that ends like this by itself gets one, too."""
_KEY_BYTES = 73
"""Leaves room for `-` and 16 digits of a hash below the 90 bytes that preparation accepts."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source, before it is read."""

    path: str
    """Relative to the source, with `/`."""
    key: str
    """Unique in the listing and fit for a tar."""
    about: dict[str, Any]
    """What the reader noted, JSON values."""


class Listing:
    """What a source will yield, in an order of its own: by the hash of the path.

    Any beginning of that order is a fair draw of the whole. The keys are paths without their
    extension, folders joined by `-`; paths that would share one get a hash of the whole path behind
    it. Neither depends on the order in which the entries came.
    """

    def __init__(self) -> None:
        # A private temporary database: SQLite sorts on disk once its cache of 2 MB is full.
        self._folder = tempfile.TemporaryDirectory(prefix="sdn-listing-")
        # Whoever takes the last partition closes it, which may be another thread.
        self._db = sqlite3.connect(
            f"{self._folder.name}/listing.sqlite", isolation_level=None, check_same_thread=False
        )
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN;"
            "CREATE TABLE entry (path BLOB PRIMARY KEY, hash TEXT, key TEXT, about TEXT)"
            " WITHOUT ROWID;"
        )

    def add(self, path: str, key_from: str | None = None, **about: Any) -> bool:
        """Note an entry; False, and nothing changed, where there is one of this path already.

        Args:
            path: of the image, relative to the source.
            key_from: path to make the key from, where that is another one.
            about: JSON values for the reader.
        """
        row = (
            path.encode(errors="surrogateescape"),
            path_hash(path),
            plain_key(key_from or path),
            json.dumps(about),
        )
        cursor = self._db.execute("INSERT OR IGNORE INTO entry VALUES (?, ?, ?, ?)", row)
        return cursor.rowcount == 1

    def get(self, path: str) -> dict[str, Any] | None:
        """What was noted about a path; None where it is not listed."""
        name = path.encode(errors="surrogateescape")
        found = self._db.execute("SELECT about FROM entry WHERE path = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def note(self, path: str, **about: Any) -> None:
        """Replace what was noted about a listed path."""
        name = path.encode(errors="surrogateescape")
        self._db.execute("UPDATE entry SET about = ? WHERE path = ?", (json.dumps(about), name))

    def __len__(self) -> int:
        """Number of entries."""
        return int(self._db.execute("SELECT COUNT(*) FROM entry").fetchone()[0])

    def __iter__(self) -> Iterator[Entry]:
        """All entries in their order."""
        self._db.execute("CREATE INDEX IF NOT EXISTS by_key ON entry (key)")
        self._db.execute("CREATE INDEX IF NOT EXISTS by_hash ON entry (hash, path)")
        query = (
            "SELECT path, key, about, (SELECT COUNT(*) FROM (SELECT 1 FROM entry AS other"
            " WHERE other.key = entry.key LIMIT 2)) FROM entry ORDER BY hash, path"
        )
        for name, key, about, shared in self._db.execute(query):
            path = name.decode(errors="surrogateescape")
            alone = shared == 1 and not _HASHED.search(key)
            unique = key if alone else f"{key}-{path_hash(path)[:16]}"
            yield Entry(path, unique, json.loads(about))

    def chunks(self, size: int) -> Iterator[tuple[Entry, ...]]:
        """All entries in their order, `size` at a time."""
        entries = iter(self)
        while chunk := tuple(itertools.islice(entries, size)):
            yield chunk

    def close(self) -> None:
        """Delete the listing."""
        self._db.close()
        self._folder.cleanup()


def plain_key(path: str) -> str:
    """A tar-safe key of a path, not unique."""
    whole = PurePosixPath(path)
    key = _UNSAFE.sub("_", "-".join(whole.with_suffix("").parts)) if whole.name else ""
    # The end of a long path tells more than its beginning; a character cut in two is left out.
    # WebDataset keeps names that begin with `__` to itself.
    return key.encode()[-_KEY_BYTES:].decode(errors="ignore").lstrip("_") or "image"


def path_hash(path: str) -> str:
    """SHA-256 of a path as hexadecimal digits."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()
