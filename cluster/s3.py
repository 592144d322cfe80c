"""The S3 endpoint of a local cluster: moto's server, closed to web pages.

    python cluster/s3.py HOST PORT

It keeps everything in memory and takes any credentials. A page in a browser on this machine could reach it too: requests
with an `Origin`, and requests for another host's name, are refused.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def closed_to_pages(app: App, hosts: Iterable[str]) -> App:
    """The WSGI application, which answers 403 to requests from web pages: with an `Origin`, with a `Sec-Fetch-Site` (which
    browsers send for pictures and forms too), or with a `Host` not in `hosts`."""
    allowed = frozenset(hosts)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        from_page = "HTTP_ORIGIN" in environ or environ.get("HTTP_SEC_FETCH_SITE", "none") != "none"
        if from_page or environ.get("HTTP_HOST") not in allowed:
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"requests from web pages are refused\n"]
        return app(environ, start_response)

    return answer


def main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    host, port = sys.argv[1], int(sys.argv[2])
    app = closed_to_pages(DomainDispatcherApplication(create_backend_app), (f"{host}:{port}", f"localhost:{port}"))
    run_simple(host, port, app, threaded=True)


if __name__ == "__main__":
    main()
