import traceback

import pytest
import typer
from mlflow.exceptions import MlflowException

from pipelines.flows.notices import guarding
from pipelines.masking import masked, masked_errors, public
from pipelines.registry import RegistryError
from pipelines.settings import Settings
from pipelines.terminal import expected_errors
from pipelines.tracking_place import public_uri, shown_uri, tracking_uri

SECRET = "not-shown-anywhere"


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://sdn:{}@db:5432/mlflow",
        "https://someone:{}@example.org/api",
        "postgresql://db/mlflow?user=sdn&password={}&sslmode=require",
        "https://{}@example.org/api",
        "(https://s3.example.org/a?X-Amz-Expires=9&X-Amz-Signature={})",
        "MLflow at postgresql://sdn:{}@db/mlflow cannot be asked (it is gone): see `sdn doctor`",
    ],
)
@pytest.mark.parametrize("password", ["plain", "with:colon", "p%40ss/w0rd"])
def test_a_password_is_not_shown(address, password):
    """The password of an address becomes stars, alone and in a sentence; the rest stays."""
    if address.startswith("https://{}"):
        password = "a-token"  # with more it would be a user and a password
    found = masked(address.format(password))
    assert found == address.format("***")


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000",
        "s3://bucket/prefix",
        "sqlite:///runs/mlflow.db",
        "postgresql://sdn@db/mlflow",
        "http://127.0.0.1:4200/runs?page=2&token_count=3",
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SDN_AUTH", f"anna:{SECRET}"),
        ("PREFECT_API_AUTH_STRING", f"anna:{SECRET}"),
        ("SDN_DATABASE", f"postgresql://sdn:{SECRET}@db/mlflow"),
        ("SDN_DATABASE", f"postgresql://db/mlflow?user=sdn&password={SECRET}"),
        ("SDN_NOTIFY_URL", SECRET),
        ("RAY_AUTH_TOKEN", SECRET),
    ],
)
def test_what_variables_hold_in_secret_is_masked_wherever_it_stands(monkeypatch, name, value):
    """With this one set alone its password is in no text, without an address about it either."""
    text = f"refused: {SECRET} is wrong"
    assert masked(text) == text
    monkeypatch.setenv(name, value)
    for shown in (masked, public):
        assert shown(text) == "refused: *** is wrong"
        assert SECRET not in shown(f"{value} is wrong")


def test_a_database_without_a_password_may_be_named(monkeypatch):
    """An address with nothing to hide is left as it is."""
    monkeypatch.setenv("SDN_DATABASE", "sqlite:///mlflow.db")
    assert masked("sqlite:///mlflow.db is locked") == "sqlite:///mlflow.db is locked"


def test_a_link_for_everybody_has_neither_user_nor_password(monkeypatch):
    """It is the same whatever this process has in its environment: machines compare it."""
    assert public_uri(f"http://anna:{SECRET}@mlflow:5000/x") == "http://mlflow:5000/x"
    asked = f"postgresql://db/mlflow?user=sdn&password={SECRET}"
    assert public_uri(asked) == "postgresql://db/mlflow?user=sdn&password=***"
    monkeypatch.setenv("SOME_TOKEN", "mlflow")
    assert public_uri("http://mlflow:5000") == "http://mlflow:5000"


def failing():
    """What MLflow raises of an address that it repeats, and what is made of it."""
    address = f"http://anna:{SECRET}@mlflow:5000"
    refused = ConnectionError(111, f"{address} refused")
    failed = MlflowException(f"API request to {address} failed with {refused}")
    failed.__cause__ = refused
    raise ValueError(failed, f"of {address}") from failed


@pytest.mark.parametrize("wrap", [masked_errors(), guarding], ids=["anything", "a flow"])
def test_errors_leave_masked_with_those_they_came_from(wrap):
    """Neither the text nor the traceback of any of them has the password."""
    with pytest.raises(ValueError, match="anna") as raised:
        wrap(failing)()
    error = raised.value
    told = "".join(traceback.format_exception(error)) + repr(error) + error.__cause__.message
    assert SECRET not in told
    assert told.count("anna:***@mlflow:5000") > 3
    assert isinstance(error.__cause__, MlflowException)


def test_the_registrys_errors_are_masked_from_the_start():
    """They become parts of notices, tags and artifacts."""
    address = "http://anna:{}@m is gone"
    assert str(RegistryError(address.format(SECRET))) == address.format("***")
