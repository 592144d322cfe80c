"""Credentials cut out of text that is logged, printed or recorded. Every pattern takes time linear in the text."""

import re

SCHEME = re.compile(r":[/\\]{2}|(?<!\S)//")
PASSWORD_WITH_SLASH = re.compile(r"[^/:@]+:(?!\d+(?:[/?#\"]|$))")
SCHEMELESS = re.compile(r"(?<!\S)[^\s/:@]{1,200}:[^\s/:@]{1,200}@(?=[\w.-]{1,253}:\d{1,5}(?!\w))")

SECRET_KEYS = (
    "password|passwd|passphrase|pwd|token|secret|signature|sig|credential|authorization"
    "|(?:access|account|api|private)[_-]?key(?:_?id)?"
)
WEAK_KEYS = "auth|key|pass|pw|sas|jwt|pat|code|creds?|session"  # only where a URI or a connection string has its fields
IN_QUERY = re.compile(rf"(?i)(?<=[?&])((?:[\w.%-]{{0,80}}(?:{SECRET_KEYS})|{WEAK_KEYS})(?:%3d|=))[^&\s#'\"]+")
IN_FIELDS = re.compile(rf"(?i)(?<=[;#])((?:[\w.%-]{{0,80}}(?:{SECRET_KEYS})|{WEAK_KEYS})=)[^;&\s#'\"]+")
IN_WORDS = re.compile(rf"(?i)((?<![^\s,({{'\"])[\w.-]{{0,80}}(?:{SECRET_KEYS})=['\"]?)[^;&\s#'\",]+")
IN_QUOTES = re.compile(  # JSON, and what Python shows of a dictionary
    rf"(?i)((?<![\w.-])[\w.-]{{0,80}}(?:{SECRET_KEYS})\\?['\"]\s{{0,3}}:\s{{0,3}}\\?['\"])[^'\"\\]+"
)
IN_LINES = re.compile(  # YAML and INI files
    r"(?i)((?<![\w.-])[\w.-]{0,80}(?:password|passwd|passphrase|(?:access|secret|api|private)_key)\s{0,3}[:=]\s{1,3})[^\s'\"]+"
)
COOKIE = re.compile(r"(?i)((?<![\w-])(?:set-)?cookie['\"]?\s{0,3}:\s{0,3}['\"]?)[^\n'\"]+")
HEADER = re.compile(
    r"(?i)(?<![\w-])((?:(?:proxy-)?authorization['\"]?\s{0,3}[:=]\s{0,3}['\"]?(?:basic\s|bearer\s|digest\s|token\s)?)"
    r"|x-[\w-]{0,40}(?:token|key|secret)['\"]?\s{0,3}:\s{0,3}['\"]?|bearer\s(?=\S{0,200}\d))[^\s'\",]+"
)
SHAPES = re.compile(
    r"(?<![\w.-])(?:gh[pousr]_\w{10,}|github_pat_\w{10,}|glpat-[\w-]{10,}|hf_[A-Za-z0-9]{16,}|xox[abeprs]-[\w-]{10,}"
    r"|sk-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{30,}|ya29\.[\w-]{10,}|npm_\w{30,}|pypi-[\w-]{16,}|dapi[0-9a-f]{32}"
    r"|eyJ[\w-]{5,}\.[\w-]+\.[\w-]*)"
)
PRIVATE_KEY = re.compile(r"(?s)-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}-----|\Z)")
SECRET_VALUE = re.compile(r"(?i)(?:basic|bearer)\s+\S+|-----BEGIN .*|[0-9a-f]{32,}")


def redact(text: str) -> str:
    """Cut credentials: the "user:password@" of URIs, secret fields of queries, fragments, connection strings, JSON and
    settings, headers of requests, private keys, and tokens of known shapes. A host's port and models:/name@alias stay."""
    if "@" in text:
        text = SCHEMELESS.sub("", re.sub(r"\S+", _without_users, text))
    if "=" in text or "%3" in text:
        for pattern in (IN_QUERY, IN_FIELDS, IN_WORDS):
            text = pattern.sub(r"\1…", text)
    for pattern in (IN_QUOTES, IN_LINES, COOKIE):
        text = pattern.sub(r"\1…", text)
    return PRIVATE_KEY.sub("…", SHAPES.sub("…", HEADER.sub(r"\1…", text)))


def may_be_secret(value: str) -> bool:
    """Whether a value that stands alone is a credential, or holds one."""
    return redact(value) != value or SECRET_VALUE.fullmatch(value.strip()) is not None


def _without_users(found: re.Match[str]) -> str:
    """A word, each URI in it without its user and password."""
    word = found[0]
    if "@" not in word:
        return word
    starts = [match.end() for match in SCHEME.finditer(word)]
    if not starts:
        return word
    ends = [*starts[1:], len(word)]
    parts = [word[: starts[0]]]
    for start, end in zip(starts, ends, strict=True):
        parts.append(_without_user(word[start:end], parts[-1].lower().endswith("s3://")))
    return "".join(parts)


def _without_user(rest: str, on_s3: bool) -> str:
    """What follows a URI's "scheme://", without "user:password@". A password may hold "/" and "@"; the names of objects on
    S3 may hold "@", so that there the first "@" ends the password."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        user, _, _ = authority.rpartition("@")
        left = rest[len(user) + 1 :]
        return left if on_s3 or ":" not in user else _after_last_at(left)
    if "@" in rest and PASSWORD_WITH_SLASH.match(rest):
        left = rest.partition("@")[2]
        return left if on_s3 else _after_last_at(left)
    return rest


def _after_last_at(text: str) -> str:
    path = re.split(r"[?#]", text, maxsplit=1)[0]
    return text[path.rfind("@") + 1 :]
