"""Requests for predictions: who may ask, how much, in which form the answer comes, and what is counted."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Query, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    generate_latest,
)
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from threestage.errors import CodedError, Warn, reason_of
from threestage.serving.answer import MEDIA_TYPES, Answer, Form, refusal
from threestage.serving.request_body import drop_body, image_in, read_body
from threestage.serving.settings import ServeSettings

Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]
FormChoice = Annotated[
    Form | None, Query(alias="as", description="form of the answer; without it, the Accept header chooses")
]
AnswerImage = Callable[[bytes, Form], Awaitable[Answer]]
VERSION_HEADER, MEAN_IOU_HEADER, DRIFT_HEADER = (f"X-Threestage-{name}" for name in ("Model", "Mean-IoU", "Drift"))
"""Of an answer; the last two are estimates."""


class ImageService:
    """`token`: what a request must carry; None: nothing. `answer` may raise anything: it costs the one request."""

    def __init__(self, answer: AnswerImage, settings: ServeSettings, token: str | None, warn: Warn) -> None:
        self._answer, self._settings, self._token, self._warn = answer, settings, token, warn
        self._open = 0
        self.registry = CollectorRegistry()
        self._requests = Counter("threestage_requests", "Answered requests", ["status"], registry=self.registry)
        self._images = Counter("threestage_images", "Predicted images", ["model"], registry=self.registry)
        self._estimates = {
            name: Summary(f"threestage_image_{name}", what, ["model"], registry=self.registry)
            for name, what in (("mean_iou", "Estimated mean IoU of an image"), ("drift", "Drift of an image"))
        }
        self._seconds = Histogram("threestage_request_seconds", "From head to answer", registry=self.registry)
        gauge = Gauge("threestage_open_requests", "Being read, waiting or answered", registry=self.registry)
        gauge.set_function(lambda: self._open)

    async def predict(self, request: Request, credentials: Credentials, form: FormChoice = None) -> Response:
        """Class of each pixel: a PNG mask, JSON (shares of the classes, mean confidence), or a JPEG overlay."""
        start = time.monotonic()
        refused = self._unauthorised(credentials) or self._overload()
        if refused is not None:
            await drop_body(request)
            answer = refused
        else:
            self._open += 1
            try:
                answer = await self._answered(request, form)
            finally:
                self._open -= 1
        self._requests.labels(answer.status).inc()
        self._seconds.observe(time.monotonic() - start)
        return _response(answer)

    async def metrics(self, credentials: Credentials) -> Response:
        """Figures for Prometheus."""
        refused = self._unauthorised(credentials)
        if refused is not None:
            return _response(refused)
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def _answered(self, request: Request, form: Form | None) -> Answer:
        form = form or accepted_form(request.headers.get("accept", "*/*"))
        if form is None:
            await drop_body(request)
            return _refused(
                406, "Accept: asks for none of image/png, application/json, image/jpeg", "serve/no-such-form"
            )
        try:
            body = await read_body(request, self._settings.most_bytes)
        except (TimeoutError, ClientDisconnect):
            return _refused(408, "image: its end did not come in time; send it again", "serve/cut-off")
        if body is None:
            return _refused(413, f"image: longer than {self._settings.most_bytes} bytes", "serve/too-large")
        try:
            answer = await self._answer(image_in(body, request.headers.get("content-type", "")), form)
        except asyncio.CancelledError:  # by a server that ends, when its time is over
            return _refused(503, "server: it ends before this image is predicted; send it again", "serve/stopped")
        except Exception as error:
            self._warn(f"a request failed: {reason_of(error)}")
            return _refused(500, "image: its prediction failed; the server's log says why", "serve/failed")
        if answer.version is not None:
            self._images.labels(answer.version).inc()
            for name, value in (("mean_iou", answer.mean_iou), ("drift", answer.drift)):
                if value is not None:
                    self._estimates[name].labels(answer.version).observe(value)
        return answer

    def _unauthorised(self, credentials: HTTPAuthorizationCredentials | None) -> Answer | None:
        given = "" if credentials is None else credentials.credentials
        if self._token is None or hmac.compare_digest(given.encode(), self._token.encode()):
            return None
        return _refused(401, "Authorization: not the server's token; send Bearer and the token", "serve/no-token")

    def _overload(self) -> Answer | None:
        most = self._settings.most_requests
        if self._open < most:
            return None
        return _refused(429, f"server: {most} requests are open already; send it again later", "serve/overload")


def accepted_form(header: str) -> Form | None:
    """The form that an Accept header prefers; JSON where it takes any. None where it takes none of ours."""
    names = {media: form for form, media in MEDIA_TYPES.items()} | {"image/*": "mask", "*/*": "json"}
    names |= {"application/*": "json"}
    best: tuple[float, Form] | None = None
    for entry in header.split(","):
        media, *parameters = (part.strip().lower() for part in entry.split(";"))
        form = names.get(media)
        weight = _weight(parameters)
        if form is not None and weight > (0 if best is None else best[0]):
            best = weight, form
    return None if best is None else best[1]


def _weight(parameters: list[str]) -> float:
    given = next((text[2:] for text in parameters if text.startswith("q=")), "1")
    try:
        return float(given)
    except ValueError:
        return 0


def _refused(status: int, message: str, code: str) -> Answer:
    return refusal(status, CodedError(message, code))


def _response(answer: Answer) -> Response:
    headers = {"Cache-Control": "no-store"}
    if answer.version is not None:
        headers[VERSION_HEADER] = answer.version
    for name, value in ((MEAN_IOU_HEADER, answer.mean_iou), (DRIFT_HEADER, answer.drift)):
        if value is not None:
            headers[name] = f"{value:.3f}"
    if answer.status == 429:
        headers["Retry-After"] = "1"
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(answer.content, answer.status, headers, answer.media_type)
