"""One POST of JSON when a submitted job has ended, for whoever is on call. It changes nothing of the job or its exit code."""

from collections.abc import Callable, Mapping
from concurrent.futures import wait
from typing import Any, NamedTuple

import requests

from threestage.data.parallel import in_daemon_thread
from threestage.errors import InputError
from threestage.hosts import parts_of
from threestage.plain_text import one_line
from threestage.redaction import redact

POST_S = 10.0
LONGEST_REASON = 500


class Webhooks(NamedTuple):
    """URLs that are posted to, by how the job ended; None: nobody is."""

    on_failure: str | None = None
    on_success: str | None = None

    def check(self) -> None:
        """Raise InputError for what is no URL of HTTP."""
        for option, url in {"--on-failure": self.on_failure, "--on-success": self.on_success}.items():
            if url is not None:
                parts = parts_of(url)
                if parts.scheme not in ("http", "https") or not parts.hostname:
                    raise InputError(
                        f"{option} {redact(url)}: is not a URL; write https://HOST/PATH", "submit/not-a-webhook"
                    )

    def post(self, code: int, report: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Post what became of a job with an exit code: `report` holds plain values, in which credentials are cut out.

        One try, no redirect is followed; what goes wrong is one warning, which names the host alone: paths of webhooks are
        often secret.
        """
        option, url = ("--on-failure", self.on_failure) if code else ("--on-success", self.on_success)
        if url is None:
            return
        body = {name: _shown(value) for name, value in report.items()} | {"exit_code": code}
        body = {"event": "failure" if code else "success", "text": _text(body), **body}
        answer = in_daemon_thread(
            requests.post, url, json=body, timeout=POST_S, allow_redirects=False, stream=True
        )  # stream: nothing of the answer but its status is read
        if not wait([answer], POST_S).done:
            problem = f"no answer within {POST_S:g} s"
        elif (error := answer.exception()) is not None:
            problem = type(error).__name__  # its text holds the URL
        elif not 200 <= answer.result().status_code < 300:
            problem = f"it answered {answer.result().status_code}"
        else:
            return
        say(f"warning: {option} {parts_of(url).hostname}: {problem}; nobody was notified")


def _shown(value: Any) -> Any:
    return redact(one_line(value))[:LONGEST_REASON] if isinstance(value, str) else value


def _text(body: Mapping[str, Any]) -> str:
    ended = "succeeded" if body["exit_code"] == 0 else f"failed with exit code {body['exit_code']}"
    reason = f": {body['reason']}" if body["reason"] else ""
    return f"threestage {body['command']} {body['name']} ({body['job']}) {ended}{reason}"
