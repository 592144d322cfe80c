"""The addresses of a server, as its OpenAPI description (/openapi.json) tells them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse

import threestage
from threestage.errors import CodedError
from threestage.serving.answer import MEDIA_TYPES
from threestage.serving.service import ImageService

PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
FORM: dict[str, Any] = {
    "schema": {"type": "object", "required": ["image"], "properties": {"image": FILE["schema"]}},
}
BODY = {
    "required": True,
    "content": {"image/jpeg": FILE, "image/png": FILE, "image/tiff": FILE, "multipart/form-data": FORM},
}
FIGURES = {
    "model": "models:/camvid/3", "width": 480, "height": 360, "mean_confidence": 0.93,
    "estimated_mean_iou": 0.61, "drift": 0.12,
    "classes": [{"id": 0, "name": "sky", "colour": [128, 128, 128], "share": 0.21}],
}  # fmt: skip
REFUSALS = {
    401: "no token, or another", 406: "none of the forms is accepted", 408: "the body did not arrive in time",
    413: "too many bytes or pixels", 415: "no image", 422: "an image that cannot be used", 429: "too many open requests",
}  # fmt: skip


def web_app(service: ImageService, version: Callable[[], str]) -> FastAPI:
    """`version`: of the model that answers now."""
    app = FastAPI(title="threestage serve", version=threestage.__version__, docs_url=None, redoc_url=None)
    page = (Path(__file__).with_name("drop_page.html")).read_text()

    async def health() -> dict[str, str]:
        """The server answers; with which version of the model."""
        return {"status": "ok", "model": version()}

    async def drop_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    async def wrong_parameter(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        forms = ", ".join(MEDIA_TYPES)
        told = CodedError(
            f"as={request.query_params.get('as')}: no form of an answer; give {forms}", "serve/no-such-form"
        )
        return JSONResponse({"error": told.as_json()}, 422)

    app.add_exception_handler(RequestValidationError, wrong_parameter)
    app.add_api_route("/", drop_page, include_in_schema=False)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", service.metrics, responses={200: {"content": {"text/plain": {}}}})
    answers = {media: FILE for media in MEDIA_TYPES.values()} | {"application/json": {"example": FIGURES}}
    responses: dict[int | str, dict[str, Any]] = {status: {"description": why} for status, why in REFUSALS.items()}
    app.add_api_route(
        "/predict",
        service.predict,
        methods=["POST"],
        responses={200: {"content": answers}, **responses},
        openapi_extra={"requestBody": BODY},
    )
    return app
