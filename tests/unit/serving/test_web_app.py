"""Why: a stranger finds out from the server itself how to ask it, and its page works without the net."""

import json
import re
from pathlib import Path
from typing import Any

from tests.asgi import ask
from tests.unit.serving.conftest import TOKEN
from threestage.serving import web_app as module

PAGE = Path(module.__file__).with_name("drop_page.html").read_text()


def test_health_needs_no_token_and_metrics_do(app: Any, model_folder: Path) -> None:
    assert json.loads(ask(app, "GET", "/health").body) == {"status": "ok", "model": str(model_folder)}
    assert ask(app, "GET", "/metrics").status == 401
    assert ask(app, "GET", "/metrics", authorization=f"Bearer {TOKEN}").body.startswith(b"# HELP threestage_requests")


def test_the_description_names_forms_bodies_refusals_and_the_token(app: Any) -> None:
    description = json.loads(ask(app, "GET", "/openapi.json").body)
    predict = description["paths"]["/predict"]["post"]
    assert {"image/jpeg", "image/png", "image/tiff", "multipart/form-data"} == set(predict["requestBody"]["content"])
    assert {"image/png", "application/json", "image/jpeg"} == set(predict["responses"]["200"]["content"])
    assert {"200", "401", "413", "415", "422", "429"} <= set(predict["responses"])
    (choice,) = predict["parameters"]
    assert choice["name"] == "as" and '"overlay"' in json.dumps(choice)
    assert predict["security"] and description["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_the_page_loads_nothing_from_elsewhere(app: Any) -> None:
    reply = ask(app, "GET", "/")
    assert reply.body.decode() == PAGE and "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"https?:|//\w|\bsrc=|@import|innerHTML", PAGE)
    assert ask(app, "GET", "/docs").status == ask(app, "GET", "/predict").status - 1 == 404
