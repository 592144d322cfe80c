"""Why: a server is asked by programs of others; each must get its answer or one line, and none may take it down."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.asgi import ask, request
from tests.images import encoded
from tests.unit.prediction.test_predict import make_model, photo
from tests.unit.serving.conftest import TOKEN
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.image_model import Model
from threestage.prediction.predict import PredictSettings, predict_input, read_model
from threestage.serving.answer import Answer, Form, answer_image
from threestage.serving.service import ImageService, accepted_form
from threestage.serving.settings import ServeSettings
from threestage.serving.web_app import web_app

BEARER = f"Bearer {TOKEN}"
PHOTO = photo(2, "PNG")


def form_of(data: bytes) -> tuple[bytes, str]:
    head = b'--x"y\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n--x"y\r\n'
    head += b'Content-Disposition: form-data; name="image"; filename="/etc/passwd"\r\nContent-Type: image/png\r\n\r\n'
    return head + data + b'\r\n--x"y--\r\n', 'multipart/form-data; boundary="x\\"y"'


def test_the_masks_are_those_of_threestage_predict(app: Any, model_folder: Path, tmp_path: Path) -> None:
    kinds = ("PNG", "JPEG", "TIFF")
    (tmp_path / "images").mkdir()
    for kind in kinds:
        (tmp_path / f"images/{kind}.{kind.lower()}").write_bytes(photo(2, kind))
    files = read_model(str(model_folder), RegistrySettings())
    predict_input(files, str(tmp_path / "images"), str(tmp_path / "out"), PredictSettings())
    for kind in kinds:
        reply = ask(app, "POST", "/predict?as=mask", photo(2, kind), authorization=BEARER)
        assert (reply.status, reply.headers["content-type"]) == (200, "image/png")
        assert reply.headers["x-threestage-model"] == str(model_folder)
        with Image.open(io.BytesIO(reply.body)) as mask, Image.open(tmp_path / f"out/masks/{kind}.png") as expected:
            assert mask.mode == "P" and np.array_equal(np.asarray(mask), np.asarray(expected))
            assert mask.getpalette() == expected.getpalette()


def test_a_form_and_a_raw_body_in_pieces_get_the_same_answer(app: Any) -> None:
    body, kind = form_of(PHOTO)
    replies = [
        ask(app, "POST", "/predict", PHOTO, parts=7, authorization=BEARER, content_type="image/png"),
        ask(app, "POST", "/predict", body, parts=3, authorization=BEARER, content_type=kind, accept="application/json"),
    ]
    figures = json.loads(replies[0].body)
    assert replies[1].body == replies[0].body and [reply.status for reply in replies] == [200, 200]
    assert (figures["height"], figures["width"]) == (33, 61)
    assert [one["name"] for one in figures["classes"]] == ["a", "b", "c"]
    assert sum(one["share"] for one in figures["classes"]) == pytest.approx(1) and 0 < figures["mean_confidence"] <= 1


def test_estimates_come_with_every_form_of_an_answer(app: Any, model_folder: Path) -> None:
    figures = json.loads(ask(app, "POST", "/predict", PHOTO, authorization=BEARER).body)
    assert 0 < figures["estimated_mean_iou"] < 1
    headers = ask(app, "POST", "/predict?as=mask", PHOTO, authorization=BEARER).headers
    found = [float(headers[f"x-threestage-{name}"]) for name in ("mean-iou", "drift")]
    assert found == pytest.approx([figures["estimated_mean_iou"], figures["drift"]], abs=6e-4)
    page = ask(app, "GET", "/metrics", authorization=BEARER).body.decode()
    for name, value in zip(("mean_iou", "drift"), found, strict=True):
        line = next(line for line in page.splitlines() if line.startswith(f"threestage_image_{name}_sum"))
        assert float(line.split()[-1]) == pytest.approx(2 * value, abs=2e-3)


def test_a_model_without_calibration_has_no_estimates(tmp_path: Path) -> None:
    model = Model.of(make_model(tmp_path), "model")
    found = answer_image(PHOTO, "json", lambda image: ("1", model.predict(image)))
    assert json.loads(found.content)["estimated_mean_iou"] is None and (found.mean_iou, found.drift) == (None, None)


def test_an_overlay_is_a_jpeg_of_the_images_size(app: Any) -> None:
    reply = ask(app, "POST", "/predict", PHOTO, authorization=BEARER, accept="text/html, image/jpeg;q=0.9, */*;q=0.1")
    with Image.open(io.BytesIO(reply.body)) as overlay:
        assert (overlay.format, overlay.size) == ("JPEG", (61, 33))


@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("*/*", "json"), ("image/*", "mask"), ("image/png", "mask"), ("image/png;q=0.2, application/json", "json"),
        ("text/html", None), ("image/png;q=0", None), ("image/png;q=x", None), ("image/jpeg, image/png", "overlay"),
    ],
)  # fmt: skip
def test_the_accept_header_chooses(header: str, form: str | None) -> None:
    assert accepted_form(header) == form


BOMB = encoded(Image.new("L", (20_000, 4_000)))[:19_000]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 415, "image/undecodable"),
        (b"no image", 415, "image/undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "image/undecodable"),
        (b"file:///etc/passwd", 415, "image/undecodable"),
        (PHOTO[:-40], 422, "image/undecodable"),
        (encoded(Image.new("RGBA", (9, 9))), 422, "image/transparent"),
        (encoded(Image.new("I;16", (9, 9))), 422, "image/bits"),
        (BOMB, 413, "image/too-many-pixels"),
        (b"x" * 20_001, 413, "serve/too-large"),
    ],
    ids=["empty", "text", "eps", "uri", "cut", "transparent", "16 bits", "bomb", "long"],
)
def test_what_is_no_image_to_predict_is_refused_in_one_line(app: Any, body: bytes, status: int, code: str) -> None:
    for sent, kind in ((body, "image/png"), form_of(body)):
        reply = ask(app, "POST", "/predict?as=mask", sent, authorization=BEARER, content_type=kind)
        assert (reply.status, reply.headers["content-type"], reply.error) == (status, "application/json", code)
        assert "\n" not in json.loads(reply.body)["error"]["message"]


@pytest.mark.parametrize(
    ("url", "headers", "status", "code"),
    [
        ("/predict", {}, 401, "serve/no-token"),
        ("/predict", {"authorization": "Bearer other"}, 401, "serve/no-token"),
        ("/predict", {"authorization": f"Basic {TOKEN}"}, 401, "serve/no-token"),
        (f"/predict?token={TOKEN}", {}, 401, "serve/no-token"),
        ("/predict", {"authorization": BEARER, "accept": "text/html"}, 406, "serve/no-such-form"),
        ("/predict?as=video", {"authorization": BEARER}, 422, "serve/no-such-form"),
    ],
)
def test_who_may_ask_and_for_what(app: Any, url: str, headers: dict[str, str], status: int, code: str) -> None:
    reply = ask(app, "POST", url, PHOTO, **headers)
    assert (reply.status, reply.error) == (status, code)
    assert (reply.headers.get("www-authenticate") == "Bearer") == (status == 401)


def test_more_requests_than_the_limit_get_429_and_a_failure_costs_one(app: Any) -> None:
    """While two are answered a third is refused; what the model raises is answered with 500 and warned of."""
    warnings: list[str] = []

    async def many() -> None:
        free = asyncio.Event()

        async def answer(data: bytes, form: Form) -> Answer:
            await free.wait()
            if data == b"fails":
                raise RuntimeError("of the device")
            return Answer(200, "image/png", data, "v1")

        limited = web_app(ImageService(answer, ServeSettings(most_requests=2), None, warnings.append), lambda: "v1")
        first, second = (asyncio.create_task(request(limited, "POST", "/predict", body)) for body in (b"a", b"fails"))
        await asyncio.sleep(0.01)
        third = await request(limited, "POST", "/predict", b"b")
        assert (third.status, third.error, third.headers["retry-after"]) == (429, "serve/overload", "1")
        free.set()
        assert (await first).body == b"a"
        failed = await second
        assert (failed.status, failed.error) == (500, "serve/failed") and b"device" not in failed.body
        assert (await request(limited, "POST", "/predict", b"c")).status == 200
        figures = (await request(limited, "GET", "/metrics")).body.decode()
        for line in (
            'threestage_requests_total{status="200"} 2.0', 'threestage_requests_total{status="429"} 1.0',
            'threestage_images_total{model="v1"} 2.0', "threestage_open_requests 0.0", "threestage_request_seconds_count 4.0",
        ):  # fmt: skip
            assert line in figures

    asyncio.run(many())
    assert len(warnings) == 1 and "of the device" in warnings[0]
