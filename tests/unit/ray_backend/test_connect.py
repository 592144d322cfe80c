"""Ray's token on this machine is for its owner's eyes."""

import os
import stat
from pathlib import Path

import pytest
from ray._private import ray_constants

from tests.refusals import refused
from threestage import private_folder as module
from threestage.private_folder import private_folder
from threestage.ray_backend.connect import CLOSED, keep_token_private, loopback_only


def test_a_token_is_made_and_kept_from_others(tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    keep_token_private(file)
    made = file.read_text()
    assert len(made) == 64 and stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    keep_token_private(file)
    assert file.read_text() == made and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_is_changed_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *CLOSED):
        monkeypatch.delenv(name, raising=False)
    with loopback_only():
        assert CLOSED.items() <= os.environ.items()
        assert not ray_constants.ENABLE_RAY_CLUSTER and (tmp_path / ".ray" / "auth_token").exists()
    assert ray_constants.ENABLE_RAY_CLUSTER and not CLOSED.keys() & os.environ.keys()


def test_a_token_of_the_user_s_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with loopback_only():
        assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert not (tmp_path / ".ray").exists()


def test_a_folder_that_somebody_else_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / name.strip("/").replace("/", "-"))
    folder = private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and private_folder() == folder
    folder.chmod(0o777)
    with refused("run/private-folder", folder):
        private_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with refused("run/private-folder", folder):
        private_folder()
