"""Listens for requests until SIGTERM or Ctrl-C, and then answers those that are open."""

import os
import secrets
import socket
from collections.abc import Callable

import uvicorn

from threestage.errors import InputError, Warn
from threestage.mlflow_sync.records import RegistrySettings
from threestage.serving.followed_model import current_version
from threestage.serving.image_answers import ImageAnswers
from threestage.serving.service import AnswerImage, ImageService
from threestage.serving.settings import ServeSettings, is_loopback
from threestage.serving.web_app import web_app
from threestage.termination import sigterm_noted

TOKEN_VARIABLE = "THREESTAGE_SERVE_TOKEN"
Started = Callable[[str], None]
"""Gets the server's URL as soon as it listens."""


def token_for(settings: ServeSettings, without: bool) -> tuple[str | None, bool]:
    """The token that requests must carry, and whether it was made here and is to be shown. InputError where other machines
    would reach a server `without` one."""
    if not without:
        given = os.environ.get(TOKEN_VARIABLE)
        return given or secrets.token_urlsafe(32), not given
    if not is_loopback(settings.host):
        raise InputError(
            f"--no-token: whoever reaches {settings.host} could use the server; leave it out, or --host",
            "serve/no-token",
        )
    return None, False


def serve_here(
    model: str, registry: RegistrySettings, settings: ServeSettings, token: str | None, started: Started, warn: Warn
) -> None:
    """Serve a model from this process. Raises InputError where there is none, or nobody can listen at the address."""
    with listening(settings) as listener:
        answers = ImageAnswers(model, registry, current_version(model, registry), settings, warn)
        try:
            run_server(listener, answers.answer, lambda: answers.followed.version, settings, token, started, warn)
        finally:
            answers.followed.close()


def listening(settings: ServeSettings) -> socket.socket:
    """A socket at the address of the settings. Raises InputError where there can be none."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise InputError(
            f"--host {settings.host} --port {settings.port}: cannot listen there ({error.strerror or error}); give another",
            "serve/address",
        ) from None


def run_server(
    listener: socket.socket,
    answer: AnswerImage,
    version: Callable[[], str],
    settings: ServeSettings,
    token: str | None,
    started: Started,
    warn: Warn,
) -> None:
    """Until SIGTERM (returns) or Ctrl-C (raises KeyboardInterrupt); nothing of a request is logged."""
    app = web_app(ImageService(answer, settings, token, warn), version)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_s,
    )
    host, port = listener.getsockname()[:2]
    started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    with sigterm_noted():
        uvicorn.Server(config).run(sockets=[listener])
