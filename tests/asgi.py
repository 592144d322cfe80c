"""One request to a web application in this process, without a port."""

import asyncio
import json
from typing import Any, NamedTuple


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """Its code."""
        return str(json.loads(self.body)["error"]["code"])


async def request(app: Any, method: str, url: str, body: bytes = b"", parts: int = 1, **headers: str) -> Reply:
    """`parts`: pieces in which the body comes; `headers`: with _ for -."""
    path, _, query = url.partition("?")
    size = -(-len(body) // parts) or 1
    pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages = iter({"type": "http.request", "body": piece, "more_body": True} for piece in pieces)
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": query.encode(),
        "headers": [(key.replace("_", "-").lower().encode(), value.encode()) for key, value in headers.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return next(messages, {"type": "http.request", "body": b"", "more_body": False})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    told = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], told, b"".join(message.get("body", b"") for message in sent[1:]))


def ask(app: Any, method: str, url: str, body: bytes = b"", **options: Any) -> Reply:
    return asyncio.run(request(app, method, url, body, **options))
