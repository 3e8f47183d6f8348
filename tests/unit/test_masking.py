import pytest
import typer

from pipelines.masking import masked
from pipelines.settings import Settings
from pipelines.terminal import expected_errors
from pipelines.tracking_place import shown_uri, tracking_uri


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://sdn:{}@db:5432/mlflow",
        "https://someone:{}@example.org/api",
        "postgresql://db/mlflow?user=sdn&password={}&sslmode=require",
        "MLflow at postgresql://sdn:{}@db/mlflow cannot be asked (it is gone): see `sdn doctor`",
    ],
)
@pytest.mark.parametrize("password", ["plain", "with:colon", "p%40ss/w0rd"])
def test_a_password_is_not_shown(address, password):
    """The password of an address becomes stars, alone and in a sentence; the rest stays."""
    found = masked(address.format(password))
    assert found == address.format("***")


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000",
        "s3://bucket/prefix",
        "sqlite:///runs/mlflow.db",
        "postgresql://sdn@db/mlflow",
        "write to someone@example.org: it is 10:30",
    ],
)
def test_a_text_without_a_password_stays(text):
    """Ports, users and sentences are left as they are."""
    assert masked(text) == text


def test_a_tracking_database_is_named_without_its_password():
    """What results and texts say of it has stars; what is connected to has the password."""
    settings = Settings(tracking_uri="postgresql+psycopg://sdn:not-shown@db/mlflow")
    assert "not-shown" in tracking_uri(settings)
    assert shown_uri(settings) == "postgresql+psycopg://sdn:***@db/mlflow"


def test_an_error_is_told_without_a_password(capsys):
    """What a command fails with is masked on its way to the terminal."""
    with pytest.raises(typer.Exit), expected_errors():
        raise ValueError("postgresql://sdn:not-shown@db/mlflow is gone")
    said = capsys.readouterr().err
    assert "sdn:***@db" in said
    assert "not-shown" not in said
