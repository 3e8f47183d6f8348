"""Lines of JSON that survive what kills their writer, in any place that keeps files."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from sdn.data.files import Files

_FULL = 1 << 18
"""Bytes of lines after which a new file begins."""


class Journal:
    """Lines keyed by ascending steps, in files `{prefix}-{first step}.jsonl`, some steps each.

    A thread writes the newest file anew every few seconds, whole, so that one killed loses little;
    what `flush` has returned from is lost no more. For use from one thread.
    """

    def __init__(self, files: Files, prefix: str, *, every_s: float = 2.0) -> None:
        """Args:
        files: the place.
        prefix: of the names; folders in it are parted by `/`.
        every_s: seconds between two writes in the background; inf writes at `flush` alone.
        """
        self._files, self._prefix = files, prefix
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._lines: list[str] = []
        self._first: int | None = None
        self._size, self._dirty = 0, False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if every_s != float("inf"):
            self._thread = threading.Thread(target=self._run, args=(every_s,), daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Flush; where an error is on its way already, one of the flush does not hide it."""
        try:
            self.close()
        except OSError:
            if error is None:
                raise

    def add(self, step: int, line: dict[str, Any]) -> None:
        """Note a line of this step."""
        text = json.dumps({"step": step, **line}, separators=(",", ":"))
        with self._lock:
            full = self._size > _FULL
        if full:
            self.flush()
            with self._lock:
                self._lines, self._first, self._size = [], None, 0
        with self._lock:
            if self._first is None:
                self._first = step
            self._lines.append(text)
            self._size += len(text)
            self._dirty = True

    def flush(self) -> None:
        """Return when everything noted is in the place.

        Raises:
            OSError: it cannot be written; the lines are kept, and another flush tries again.
        """
        with self._writing:
            with self._lock:
                if not self._dirty or self._first is None:
                    return
                name = f"{self._prefix}-{self._first:09d}.jsonl.gz"
                data = "".join(f"{line}\n" for line in self._lines).encode()
                self._dirty = False
            try:
                self._files.write(name, gzip.compress(data, 1, mtime=0))
            except OSError:
                with self._lock:
                    self._dirty = True
                raise

    def close(self) -> None:
        """Flush and end the thread."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def _run(self, every_s: float) -> None:
        while not self._over.wait(every_s):
            try:
                self.flush()
            except OSError:  # the next flush that somebody waits for says so
                continue


def read_lines(files: Files, name: str) -> Iterator[dict[str, Any]]:
    """The lines of one of a journal's files.

    Raises:
        ValueError: the file is damaged.
    """
    data = files.read(name)
    try:
        for line in gzip.decompress(data).decode().splitlines():
            yield json.loads(line)
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{files.uri}/{name} is damaged: {error}") from error


def journal_files(files: Files, below: str) -> list[str]:
    """Names of all journal files below a folder, in the order of their names."""
    found = (info.name for info in files.walk(below))
    return sorted(name for name in found if name.endswith(".jsonl.gz"))
