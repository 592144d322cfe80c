"""The image in the body of a request: raw, or the first file of a multipart form. Nothing is written to the disk."""

import asyncio
from email.message import Message

from starlette.requests import ClientDisconnect, Request

READ_S = 60
DROPPED_BYTES = 64 * 2**20
"""Of a body that is too long: so much is read and dropped, so that a client that still sends comes to read the answer."""


async def read_body(request: Request, most_bytes: int) -> bytes | None:
    """The body; None where it is longer. Raises TimeoutError, and ClientDisconnect where the client left."""
    body, read = bytearray(), 0
    async with asyncio.timeout(READ_S):
        async for chunk in request.stream():
            read += len(chunk)
            if read <= most_bytes:
                body += chunk
            elif read > most_bytes + DROPPED_BYTES:
                break
    return bytes(body) if read <= most_bytes else None


async def drop_body(request: Request) -> None:
    """For a request that is refused before it is read."""
    try:
        await read_body(request, 0)
    except (TimeoutError, ClientDisconnect):
        return


def image_in(body: bytes, content_type: str) -> bytes:
    """The bytes of the image: of multipart/form-data the first part that is a file, else the body as it is."""
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or boundary is None:
        return body
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        if b"filename" in head.lower():
            return content
    return b""
