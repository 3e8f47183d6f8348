import pytest

from pipelines.preparing import _alone
from pipelines.settings import Settings
from sdn.data.files import LocalFolder


def test_two_writers_are_kept_apart(tmp_path, monkeypatch):
    """While one writes into a place, another is refused, whatever it calls the place."""
    settings = Settings(cache=tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with (
        _alone(LocalFolder(tmp_path / "set"), settings),
        pytest.raises(ValueError, match="another process is writing into set"),
        _alone(LocalFolder("set"), settings),
    ):
        pass
    with _alone(LocalFolder("set"), settings), _alone(LocalFolder("other"), settings):
        pass
