"""One number for a whole folder, to tell whether its files are still what they were."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def folder_digest(path: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder.

    Formula: sha256 of `N:name D` for each file in the order of its name, where name is the path
    below the folder with `/` between its parts, in UTF-8, N its length in bytes, D the SHA-256 of
    the content (32 bytes). Neither where the folder lies nor dates, rights or empty folders count;
    a link counts as the file that it leads to.

    Args:
        path: the folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: it holds no file, so that there is nothing to tell apart.
    """
    if not path.is_dir():
        raise NotADirectoryError(f"expected a folder to digest, but {path} is none")
    files = {p.relative_to(path).as_posix().encode(): p for p in path.rglob("*") if p.is_file()}
    if not files:
        raise ValueError(f"expected a folder with files to digest, but {path} holds none")
    whole = hashlib.sha256()
    for name, file in sorted(files.items()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").digest()
        whole.update(b"%d:%s %s" % (len(name), name, digest))
    return whole.hexdigest()
