"""What an S3 server's errors mean: which may pass and are asked again, what to do about others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenacity import RetryCallState, Retrying

ATTEMPTS = 10
"""Of what a server answers, or damages on the way."""
PATIENCE_S = 150.0
"""How long a server may be away in mid-run, in seconds: a restart, a minute without network."""
_PASSING = {"500", "502", "503", "504", "429", "InternalError", "SlowDown", "ServiceUnavailable"}
_PASSING |= {"RequestTimeout", "RequestTimeoutException", "Throttling", "TooManyRequests"}
"""Error codes of answers that another attempt may get past."""
_PASSING_STATUSES = {429, 500, 502, 503, 504}
ABSENT = {"NoSuchKey", "404", "NotFound"}
"""Error codes of what is not there."""


class TruncatedError(OSError):
    """A body that ended before its announced length."""


def code_of(error: BaseException) -> str:
    """The error code in a server's answer; "" where there was none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    found = re.search(r"An error occurred \((\w+)\)", str(error))  # wrapped by boto3's transfers
    return found[1] if found else ""


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may get past this."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        ClientError,
        ConnectionError,  # noqa: A004 (botocore's name)
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
    )
    from urllib3.exceptions import HTTPError

    if isinstance(error, (ClientError, Boto3Error)):
        status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code_of(error) in _PASSING or status in _PASSING_STATUSES
    broken = (ConnectionError, ConnectionResetError, HTTPClientError, HTTPError, TimeoutError)
    damaged = (FlexibleChecksumError, IncompleteReadError, TruncatedError)
    return isinstance(error, (*broken, *damaged))


def _away(error: BaseException) -> bool:
    """Whether the server was not there, rather than answered in a way that may pass."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import ConnectionError, HTTPClientError  # noqa: A004 (its name)

    if isinstance(error, Boto3Error) and error.__context__ is not None:  # of its transfers
        return _away(error.__context__)
    answer = getattr(error, "response", None) or {}  # HTTPClientError has one that is None
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    lost = (ConnectionError, ConnectionResetError, HTTPClientError, TimeoutError)
    return isinstance(error, lost) or status in {502, 503, 504}  # of whatever stands before it


def asking_again(*, tries: int = ATTEMPTS, seconds: float = PATIENCE_S) -> Retrying:
    """Calls again what fails in a way that may pass.

    Args:
        tries: of what a server answers, or damages on the way.
        seconds: after which nothing is tried again; until then a server that is away is waited
            for, unless they are too few to wait.
    """
    from tenacity import Retrying, retry_if_exception, wait_random_exponential

    def enough(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        waited_for = seconds >= PATIENCE_S and error is not None and _away(error)
        passed = state.seconds_since_start or 0.0
        return passed >= seconds or (state.attempt_number >= tries and not waited_for)

    return Retrying(
        retry=retry_if_exception(may_pass),
        # A single fault costs some hundredths of a second, an outage is waited for longer.
        wait=wait_random_exponential(multiplier=0.03, max=5),
        stop=enough,
        reraise=True,
    )


_ADVICE = {
    "NoSuchBucket": "there is no such bucket: make it, or correct its name",
    "InvalidAccessKeyId": "the server does not know AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "AccessDenied": "these credentials may not do that there, or there is no such bucket: use "
    "others, or have them allowed it",
    "403": "these credentials may not do that, or the secret is wrong: check AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY",
}


def advice_on(error: BaseException, endpoint: str | None) -> str:
    """What the server said, and what to do."""
    from botocore.exceptions import NoCredentialsError

    if isinstance(error, NoCredentialsError):
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    code = code_of(error)
    if code in _ADVICE:
        return f"{_ADVICE[code]} ({code})"
    server = endpoint or "Amazon's server"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"{reason}. Check that {server} answers (SDN_S3_ENDPOINT), that the bucket exists and that "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may use it"
    )
