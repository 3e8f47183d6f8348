"""Prefect's server asked over HTTP: quick to load, and told apart what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import httpx
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

if TYPE_CHECKING:
    from types import TracebackType

    from pipelines.settings import Settings


class PrefectApiError(RuntimeError):
    """The server refuses; the text says what was asked, what came and what to do."""


class LoginError(PrefectApiError):
    """The server wants another login."""


class _BusyError(PrefectApiError):
    """It says so: its database was locked for too long, and nothing was done."""


class PrefectApi:
    """A server, with the login that it may ask for."""

    def __init__(self, url: str, login: tuple[str, str] | None = None) -> None:
        """Ask nobody yet.

        Args:
            url: with `/api`.
            login: user and password; None for none.
        """
        self.url = url.rstrip("/")
        # Certificates take 70 ms of a core to load, at each client.
        secure = self.url.startswith("https")
        self._client = httpx.Client(auth=login, timeout=30, verify=secure)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The configured one.

        Raises:
            ValueError: none is configured, or SDN_AUTH is not user:password.
        """
        if settings.prefect_api_url is None:
            raise ValueError(
                "PREFECT_API_URL is not set: set it, such as "
                "PREFECT_API_URL=http://127.0.0.1:4200/api"
            )
        return cls(settings.prefect_api_url, settings.credentials)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get(f"{self.url}/health", timeout=3).is_success
        except httpx.HTTPError:
            return False

    def has_pool(self, pool: str) -> bool:
        """Whether it answers and has a work pool.

        Raises:
            LoginError: it wants another login.
        """
        try:
            return self.ask("GET", f"work_pools/{pool}", absent=None) is not None
        except LoginError:
            raise
        except (PrefectApiError, httpx.HTTPError):  # it may be starting
            return False

    @retry(
        retry=retry_if_exception_type(_BusyError),
        stop=stop_after_attempt(5),
        wait=wait_exponential_jitter(multiplier=0.5, max=5),
        reraise=True,
    )
    def ask(self, method: str, path: str, content: Any = None, *, absent: Any = ...) -> Any:
        """The server's answer; a busy one is asked again.

        Args:
            method: of HTTP.
            path: below `/api`.
            content: JSON of the request.
            absent: returned where there is no such thing (404), instead of an error.

        Raises:
            PrefectApiError: it refuses.
            httpx.HTTPError: it does not answer.
        """
        answer = self._client.request(method, f"{self.url}/{path}", json=content)
        if answer.status_code == httpx.codes.NOT_FOUND and absent is not ...:
            return absent
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            came = "another one came" if self._client.auth else "none came: SDN_AUTH is not set"
            raise LoginError(
                f"{self.url} asks for a login, and {came}; set SDN_AUTH=user:password as the "
                "server has it"
            )
        if not answer.is_success:
            busy = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            text = f"{method} {self.url}/{path}: {answer.status_code} {answer.text}"
            raise (_BusyError if busy else PrefectApiError)(text)
        return answer.json() if answer.content else None
