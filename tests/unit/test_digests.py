"""A folder's digest: the same for the same files, another for any difference."""

import hashlib

import pytest

from pipelines.digests import folder_digest

FILES = {"a.bin": b"one", "b/c.bin": b"two", "b/\u00e4.txt": b""}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_published_formula(tmp_path):
    """Names in the order of their bytes, each with its length and the digest of its content."""
    whole = hashlib.sha256()
    for name in ("a.bin", "b/c.bin", "b/\u00e4.txt"):
        encoded = name.encode()
        whole.update(f"{len(encoded)}:".encode() + encoded + b" ")
        whole.update(hashlib.sha256(FILES[name]).digest())
    assert folder_digest(write(tmp_path / "x", FILES)) == whole.hexdigest()


def test_the_place_and_empty_folders_do_not_count(tmp_path):
    """Written elsewhere in another order, by a link, with an empty folder: the same digest."""
    first = write(tmp_path / "first", FILES)
    second = write(tmp_path / "deep" / "second", dict(reversed(FILES.items())))
    (second / "empty").mkdir()
    (second / "a.bin").rename(tmp_path / "elsewhere")
    (second / "a.bin").symlink_to(tmp_path / "elsewhere")
    assert folder_digest(first) == folder_digest(second)


@pytest.mark.parametrize(
    "files",
    [
        {**FILES, "a.bin": b"onf"},
        {**FILES, "b/c.bin": b"two\0"},
        {**FILES, "more": b""},
        {name: FILES[name] for name in ("a.bin", "b/c.bin")},
        {"a.bin": b"two", "b/c.bin": b"one", "b/\u00e4.txt": b""},
        {"a.bin": b"one", "b-c.bin": b"two", "b/\u00e4.txt": b""},
    ],
    ids=["a bit", "a byte more", "a file more", "a file less", "contents swapped", "renamed"],
)
def test_any_difference_counts(tmp_path, files):
    """A changed, added, missing, swapped or renamed file gives another digest."""
    whole = folder_digest(write(tmp_path / "whole", FILES))
    assert folder_digest(write(tmp_path / "other", files)) != whole


def test_what_is_no_folder_with_files(tmp_path):
    """A missing folder, a file and an empty folder are named."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for name in ("missing", "file"):
        with pytest.raises(NotADirectoryError, match=name):
            folder_digest(tmp_path / name)
    with pytest.raises(ValueError, match="empty holds none"):
        folder_digest(tmp_path / "empty")
