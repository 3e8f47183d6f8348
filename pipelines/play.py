"""A page on which images appear while one types: the application that `sdn play` serves.

It is meant for this machine alone: requests under another host's name or from another site's page
are refused, nothing is loaded from elsewhere, and each picture carries its lineage in its file.
"""

from __future__ import annotations

import base64
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipelines.generation import image_metadata
from sdn.config.networks import MOST_NOISE
from sdn.data.reading import DamagedSample
from sdn.sampling import encode_png

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from starlette.responses import Response
    from torch import Tensor

    from pipelines.generation import FoundModel
    from pipelines.neighbours import Neighbour, Neighbours

LARGEST_SEED = 2**31 - 1
_PAGES = 256
"""Open pages whose newest request is remembered."""
_HOSTS = ["127.0.0.1", "localhost"]
_FIELDS = {"caption": "Caption", "seed": "Seed", "noise_scale": "Noise"}
"""What the page calls what it asks with."""
_SITES = (None, "same-origin", "none")
"""What a browser says of a request by our own page, or by none (an address typed in)."""


class Draws(Protocol):
    """A finished model: `sdn.sampling.Synthesizer`, or another that draws."""

    def __call__(
        self, captions: Sequence[str], *, seed: int = 0, noise_scale: float | None = None
    ) -> Tensor:
        """(N, 3, H, W) uint8 pixels of N captions, with the model's own noise scale for None."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A model on the page."""

    model: FoundModel
    synthesizer: Draws
    examples: Sequence[str] = ()
    """Captions to click."""

    @property
    def name(self) -> str:
        """For people, such as `sdn-openmoji version 2`; unique on the page."""
        return self.model.title

    @property
    def noise(self) -> bool:
        """Whether the seed changes the picture."""
        return bool(getattr(self.synthesizer, "noise", False))

    @property
    def noise_scale(self) -> float:
        """How far its noise goes where the page asks for no other."""
        return float(getattr(self.synthesizer, "noise_scale", 1.0))


class Ask(BaseModel):
    """What the page asks for."""

    caption: str
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    noise_scale: float | None = Field(
        default=None, ge=0, le=MOST_NOISE, description="None for each model's own."
    )
    number: int = Field(default=0, description="Grows with each request of a page.")
    page: str = Field(default="", max_length=64, description="Tells open pages apart.")


class Superseded(Exception):  # noqa: N818 (named for what happened)
    """The page has asked for something newer meanwhile."""


class Turns:
    """One drawing at a time, and of each page only the newest request: older ones do not queue."""

    def __init__(self) -> None:
        self._newest: OrderedDict[str, int] = OrderedDict()
        self._changed = threading.Condition()
        self._busy = False

    def take(self, page: str, number: int) -> None:
        """Wait for one's turn; `leave` ends it.

        Raises:
            Superseded: a newer request of the same page came before it was this one's turn.
        """
        with self._changed:
            self._newest[page] = max(number, self._newest.get(page, number))
            self._newest.move_to_end(page)
            if len(self._newest) > _PAGES:
                self._newest.popitem(last=False)
            self._changed.notify_all()  # those that wait look whether this supersedes them
            self._changed.wait_for(lambda: not self._busy or self._is_old(page, number))
            self._refuse_old(page, number)
            self._busy = True

    def check(self, page: str, number: int) -> None:
        """Give up between two models.

        Raises:
            Superseded: a newer request of the same page came.
        """
        with self._changed:
            self._refuse_old(page, number)

    def leave(self) -> None:
        """Let the next one draw."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _is_old(self, page: str, number: int) -> bool:
        return self._newest.get(page, number) > number

    def _refuse_old(self, page: str, number: int) -> None:
        if self._is_old(page, number):
            raise Superseded


def create_app(models: Sequence[Shown], neighbours: Mapping[str, Neighbours | str]) -> FastAPI:
    """The application.

    Args:
        models: side by side in this order; at least one, each name once.
        neighbours: name of a model -> its training images, or why they cannot be shown.

    Raises:
        ValueError: no model, a name twice, or a model without an entry in `neighbours`.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected models of different names, at least one, not {names}")
    if missing := set(names) - set(neighbours):
        raise ValueError(f"nothing said of the neighbours of {', '.join(sorted(missing))}")
    app = FastAPI(title="sdn play", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)
    app.middleware("http")(_own_pages_only)
    app.exception_handler(RequestValidationError)(_not_understood)
    turns = Turns()

    @app.get("/")
    def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        html = _page(models, neighbours, nonce)
        return HTMLResponse(html, headers={"Content-Security-Policy": _policy(nonce)})

    @app.post("/draw")
    def draw(ask: Ask) -> JSONResponse:
        began = time.perf_counter()
        answer: dict[str, Any] = {"number": ask.number}
        try:
            turns.take(ask.page, ask.number)
            try:
                pictures = []
                for model in models:
                    turns.check(ask.page, ask.number)
                    pictures.append(_picture(model, neighbours[model.name], ask))
            finally:
                turns.leave()
        except Superseded:
            return JSONResponse(answer | {"superseded": True})
        refusals = dict.fromkeys(p["error"] for p in pictures if p["error"])
        answer |= {"pictures": pictures, "error": "; ".join(refusals)}
        answer["ms"] = _milliseconds(began)
        return JSONResponse(answer, status_code=200 if any(p["png"] for p in pictures) else 422)

    return app


def _picture(model: Shown, known: Neighbours | str, ask: Ask) -> dict[str, Any]:
    """What the page shows of one model."""
    answer: dict[str, Any] = {"model": model.name, "png": "", "error": "", "neighbours": []}
    # Of a model without noise the page says that neither changes anything.
    seed, scale = (ask.seed, ask.noise_scale) if model.noise else (0, None)
    began = time.perf_counter()
    try:
        pixels = model.synthesizer([ask.caption], seed=seed, noise_scale=scale)[0]
    except (TypeError, ValueError) as error:  # the caption: too long, or without a letter
        return answer | {"error": str(error)}
    answer["ms"] = _milliseconds(began)
    about = image_metadata(model.model, ask.caption, seed, scale)
    answer["png"] = _base64(encode_png(pixels, about))
    if not isinstance(known, str):
        try:
            answer["neighbours"] = [_neighbour(one) for one in known.nearest(pixels)]
        except (DamagedSample, OSError) as error:
            answer["no_neighbours"] = f"The training images cannot be read: {error}"
    return answer


def _neighbour(one: Neighbour) -> dict[str, Any]:
    return {
        "key": one.key,
        "captions": list(one.captions),
        "png": _base64(encode_png(one.pixels)),
        "distance": round(one.distance, 1),
    }


def _page(models: Sequence[Shown], neighbours: Mapping[str, Neighbours | str], nonce: str) -> str:
    """The page with what does not change while one types."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("pipelines"), autoescape=True)
    credits_ = dict.fromkeys(
        known.attribution for known in neighbours.values() if not isinstance(known, str)
    )
    return environment.get_template("play.html").render(
        models=[(model, _about(neighbours[model.name])) for model in models],
        examples=list(dict.fromkeys(text for model in models for text in model.examples)),
        silent=[model.name for model in models if not model.noise],
        credits=[credit for credit in credits_ if credit],
        scales={model.name: f"{model.noise_scale:g}" for model in models if model.noise},
        largest_seed=LARGEST_SEED,
        most_noise=f"{MOST_NOISE:g}",
        nonce=nonce,
    )


def _about(known: Neighbours | str) -> dict[str, Any]:
    """How many training images are compared with, or why none are."""
    if isinstance(known, str):
        return {"reason": known}
    return {"kept": len(known), "total": known.total}


async def _own_pages_only(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Refuse what another site's page sends; tell the browser to keep and to load nothing."""
    origin = request.headers.get("origin")
    own = f"{request.url.scheme}://{request.headers.get('host')}"
    site = request.headers.get("sec-fetch-site")
    # Links to the page from elsewhere are harmless: a page that was opened so cannot be read.
    if origin not in (None, own) or (site not in _SITES and request.method != "GET"):
        return JSONResponse({"error": "refused: asked for by another page"}, status_code=403)
    answer = await call_next(request)
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Referrer-Policy"] = "no-referrer"
    answer.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    return answer


async def _not_understood(_: Request, error: Exception) -> JSONResponse:
    """A request of another form than the page's, in the words of the page's errors."""
    assert isinstance(error, RequestValidationError)
    fields = [str(one["loc"][-1]) for one in error.errors()]
    reasons = [
        f"{_FIELDS.get(field, field)}: {one['msg']}"
        for field, one in zip(fields, error.errors(), strict=True)
    ]
    return JSONResponse({"error": "; ".join(reasons), "fields": fields}, status_code=422)


def _policy(nonce: str) -> str:
    """Only this page's own script and style, pictures inside its answers, and its own address."""
    return (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _milliseconds(began: float) -> float:
    return round(1000 * (time.perf_counter() - began), 1)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
