import json
from pathlib import Path

import pytest

from pipelines.run import Job, RunSpec, perform
from pipelines.stage import Stage
from pipelines.store import DONE, LocalStore, StoreError, clear, open_store, read_mark, write_mark


def test_a_folder_without_mark_is_no_result(tmp_path):
    """Files without the mark are never taken for a result; the mark makes them one."""
    store = LocalStore(tmp_path / "store")
    folder = store.workspace("stages/one")
    (folder / "model.pt").write_bytes(b"half")
    assert store.done("stages/one") is None
    with pytest.raises(StoreError, match="is not finished: run the stage that makes it"):
        store.fetch("stages/one")
    store.publish("stages/one", {"loss": 0.5})
    assert store.done("stages/one") == {"loss": 0.5}
    assert (store.fetch("stages/one") / "model.pt").read_bytes() == b"half"
    assert store.done("stages/two") is None


@pytest.mark.parametrize("content", ["", '{"loss": 0.', "[1, 2]", "null", "7"])
def test_half_written_mark_is_none(tmp_path, content):
    """A mark that was cut off, or holds no table, counts as none."""
    (tmp_path / DONE).write_text(content)
    assert read_mark(tmp_path) is None
    assert LocalStore(tmp_path).done(".") is None


def test_mark_that_is_no_text_is_none(tmp_path):
    """A damaged mark is none either, and publishing again repairs it."""
    (tmp_path / DONE).write_bytes(b"\xff\xfe\x00{")
    assert read_mark(tmp_path) is None
    write_mark(tmp_path, {"again": True, "first": {"two": 2, "three": 3}})
    found = read_mark(tmp_path)
    assert found == {"again": True, "first": {"two": 2, "three": 3}}
    assert list(found["first"]) == ["two", "three"]  # the last of several models is the newest


def test_mark_is_written_last_and_whole(tmp_path, monkeypatch):
    """A death while the mark is written leaves the folder unfinished."""
    store = LocalStore(tmp_path)
    (store.workspace("one") / "file").write_bytes(b"x")

    def dies(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            store.publish("one", {"a": 1})
    assert store.done("one") is None
    assert (store.workspace("one") / "file").read_bytes() == b"x"
    store.publish("one", {"a": 2})
    assert store.done("one") == {"a": 2}
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [DONE, "file"]


def test_workspace_is_kept_until_cleared(tmp_path):
    """What an interrupted stage has built is there when it is asked for again."""
    store = LocalStore(tmp_path)
    inner = store.workspace("one") / "part"
    inner.mkdir()
    (inner / "file").write_bytes(b"x")
    assert (store.workspace("one") / "part" / "file").is_file()
    clear(store.workspace("one"))
    assert list(store.workspace("one").iterdir()) == []


def test_store_that_cannot_be_written(tmp_path):
    """A store below a file is refused before any work, with its path and what to do."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be written") as caught:
        LocalStore(tmp_path / "file" / "store").check()
    assert str(tmp_path / "file" / "store") in str(caught.value)
    assert "make the folder writable or name another one with --store" in str(caught.value)


def test_read_only_store(tmp_path, monkeypatch):
    """A folder that lets nothing be written is refused with the system's reason."""

    def refuses(self, data):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuses)
    with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\)"):
        LocalStore(tmp_path).check()


def test_check_leaves_nothing(tmp_path):
    """The probe makes the folder and leaves no file in it."""
    store = LocalStore(tmp_path / "new" / "store")
    store.check()
    assert list((tmp_path / "new" / "store").iterdir()) == []


@pytest.mark.parametrize("uri", ["gs://bucket/prefix", "http://host/store"])
def test_unknown_scheme(tmp_path, uri):
    """Another scheme is refused with those that are known."""
    with pytest.raises(StoreError, match="is not known; use a folder or s3://") as caught:
        open_store(uri, tmp_path)
    assert uri in str(caught.value)


def test_folder_is_a_local_store(tmp_path):
    """Anything without a scheme is a folder, and its address is absolute."""
    store = open_store(str(tmp_path / "a" / ".." / "b"), tmp_path)
    assert isinstance(store, LocalStore)
    assert store.uri == str((tmp_path / "b").resolve())


def test_finished_work_is_not_done_again(tmp_path):
    """A stage works once; a second run, or one after it failed, gets or finishes its result."""
    run = RunSpec("tiny", store=str(tmp_path)).open()
    calls = []

    def work(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise RuntimeError("broken off")
        (folder / "file").write_bytes(b"x")
        return {"answer": 42}

    job = Job(stage=Stage(name="one", config={"a": 1}), work=work)
    with pytest.raises(RuntimeError, match="broken off"):
        perform(run, job)
    first, second = perform(run, job), perform(run, job)
    assert (first.fresh, second.fresh) == (True, False)
    assert first.result == second.result == {"answer": 42}
    assert len(calls) == 2
    assert calls[0] == calls[1]
    mark = json.loads((tmp_path / first.folder / DONE).read_text())
    assert (mark["stage"], mark["key"], mark["config"]) == ("one", job.stage.key, {"a": 1})
