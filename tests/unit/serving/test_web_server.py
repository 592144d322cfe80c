"""Why: nobody else may reach a server by accident, and a token may stand nowhere but on the owner's terminal."""

import socket

import pytest

from tests.refusals import refused
from threestage.serving import settings as settings_module
from threestage.serving.settings import ServeSettings, require_serve_extra
from threestage.serving.web_server import TOKEN_VARIABLE, listening, token_for


def test_a_token_is_made_or_taken_from_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    (made, is_new), (other, _) = token_for(ServeSettings(), without=False), token_for(ServeSettings(), without=False)
    assert made and len(made) >= 32 and is_new and made != other
    monkeypatch.setenv(TOKEN_VARIABLE, "mine")
    assert token_for(ServeSettings(), without=False) == ("mine", False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_other_machines_always_need_a_token(host: str) -> None:
    with refused("serve/no-token", host):
        token_for(ServeSettings(host=host), without=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_may_go_without(host: str) -> None:
    assert token_for(ServeSettings(host=host), without=True) == (None, False)


def test_it_listens_on_loopback_and_says_that_a_port_is_taken() -> None:
    with listening(ServeSettings(port=0)) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1" and listener.family == socket.AF_INET
        with refused("serve/address", port):
            listening(ServeSettings(port=port))


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "PACKAGES", ("fastapi", "no_such_package"))
    with refused("serve/missing-package", "no_such_package not installed; pip install 'threestage[serve]'"):
        require_serve_extra(on_ray=False)
