"""Credentials cut out of text that is logged, printed or recorded."""

import re

IN_AUTHORITY, WITH_SLASHES = r"[^\s/?#]*@", r"[^\s/:@]+:(?!\d+(?:[/?#\s]|$))[^\s@]*@"
USER = re.compile(rf"(?<=://)(?:{IN_AUTHORITY}|{WITH_SLASHES})")
SECRET_KEYS = "password|passwd|pwd|token|secret|signature|sig|credential|access_?key(?:_?id)?|api_?key|sslpassword"
QUERY = re.compile(rf"(?i)(?<=[?&])([\w.-]*(?:{SECRET_KEYS})=)[^&\s#'\"]+")


def redact(text: str) -> str:
    """Strip the "user:password@" of every URI in a text, and the values of what its query calls a password, token, key or
    signature. A host's port and models:/name@alias stay."""
    return QUERY.sub(r"\1…", USER.sub("", text))
