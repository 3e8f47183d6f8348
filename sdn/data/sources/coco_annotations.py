"""COCO's annotation files, read piece by piece: they are single JSON values of up to gigabytes."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdn.data.files import Files

_PIECE = 1 << 20
_LARGEST = 16 << 20
"""Characters of the largest single entry; more is taken for a file that is no annotation file."""
_NUMBER = ("", *"0123456789+-.eE")
_BLANKS = re.compile(r"[ \t\r\n]*")


def entries(files: Files, name: str, field: str) -> Iterator[Any]:
    """The elements of the list `field` of the object in a file, one in memory at a time.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    with files.open(name) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        pieces = _Pieces(text)
        try:
            yield from pieces.elements(field)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name} must be an annotation file of COCO, but cannot be read near character "
                f"{pieces.read}: {error}; get it again"
            ) from error


class _Pieces:
    """A window that moves over the text of a JSON object."""

    def __init__(self, text: TextIO) -> None:
        self.read = 0
        self._text = text
        self._window = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def elements(self, field: str) -> Iterator[Any]:
        self._expect("{")
        if self._peek() == "}":
            self._expect("}")
            self._expect_end()
            return
        more = True
        while more:
            name = self._value()
            self._expect(":")
            if self._peek() != "[":
                self._value()
            else:
                for element in self._list():
                    if name == field:
                        yield element
            more = self._expect(",}") == ","
        self._expect_end()

    def _list(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        more = True
        while more:
            yield self._value()
            more = self._expect(",]") == ","

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except json.JSONDecodeError:
                if not self._grow():
                    raise
                continue
            # The window may have cut a number in two: `-2` and `.5`.
            if self._window[end : end + 1] not in _NUMBER or not self._grow():
                self._at = end
                return value

    def _peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            blanks = _BLANKS.match(self._window, self._at)
            assert blanks is not None
            self._at = blanks.end()
            if self._at < len(self._window) or not self._grow():
                return self._window[self._at : self._at + 1]

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if not found or found not in characters:
            raise ValueError(f"expected {' or '.join(characters)}, not {found or 'the end'!r}")
        self._at += 1
        return found

    def _expect_end(self) -> None:
        if found := self._peek():
            raise ValueError(f"expected the end, not {found!r}")

    def _grow(self) -> bool:
        """Read on; False at the end of the text."""
        kept = self._window[self._at :]
        if len(kept) > _LARGEST:
            raise ValueError(f"an entry of more than {_LARGEST} characters")
        # At least as much as there is: an entry is tried again only after it has doubled.
        piece = self._text.read(max(_PIECE, len(kept)))
        self._window, self._at = kept + piece, 0
        self.read += len(piece)
        return bool(piece)
