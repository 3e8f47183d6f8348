"""Parquet files through the seam of `sdn.data.files`, in flat memory."""

from __future__ import annotations

from typing import Any, BinaryIO

_BATCH_ROWS = 64
_BATCH_BYTES = 16 << 20
_BUFFER = 1 << 20
"""Without one, pyarrow reads a whole column of a row group at once."""


class WatchedFile:
    """A file that remembers that it could not be reached: that is no fault of its content."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Left to the one who opened the file."""


def opened(file: WatchedFile) -> Any:
    """The file as pyarrow.parquet.ParquetFile; raises what pyarrow does."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    return parquet.ParquetFile(file, buffer_size=_BUFFER, page_checksum_verification=True)


def batch_rows(about: Any) -> int:
    """Rows to hold at once: fewer where they are large."""
    row_bytes = max(1, about.total_byte_size // max(1, about.num_rows))
    return int(max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes)))


def require_pyarrow() -> None:
    """Say what to install where pyarrow is missing."""
    try:
        import pyarrow  # noqa: F401, ICN001
    except ImportError as error:
        raise ImportError(
            "reading parquet needs pyarrow: pip install 'sdn[pipeline]' or pip install pyarrow"
        ) from error
