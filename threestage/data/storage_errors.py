"""What a storage library raises, as one line: what is wrong, where, and how to fix it. No line holds a credential."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from threestage.data import storage
from threestage.data.storage import ANONYMOUS_VARIABLE, S3_SCHEME, STYLE_VARIABLE, StorageSettings
from threestage.errors import InputError, UnwritablePlace
from threestage.redaction import redact

SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
SHORTEST_SECRET = 8
PERMISSIONS = {
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "CreateMultipartUpload": "s3:PutObject",
}

BUSY_CODES = {
    "slowdown", "serviceunavailable", "internalerror", "toomanyrequests", "requesttimeout",
    "408", "429", "500", "502", "503", "504",
}  # fmt: skip
REGION_CODES = {"authorizationheadermalformed", "permanentredirect", "illegallocationconstraintexception", "301"}
FULL_CODES = {"quotaexceeded", "xminiostoragefull", "insufficientstorage", "507"}
OTHER_STORE_CODES = {"resourcenotfound", "404", "405", "methodnotallowed"}
CURL = {"6": "nohost", "7": "refused", "28": "silent", "35": "notls", "52": "nohttp", "60": "untrusted"}
BOTOCORE = {
    "EndpointConnectionError": "refused",
    "ConnectTimeoutError": "silent",
    "ReadTimeoutError": "silent",
    "SSLError": "untrusted",
    "NoCredentialsError": "nocredentials",
}

OF_THE_STORE = {
    "invalidaccesskeyid": ("{endpoint} does not know the access key; {fix_credentials}", "storage/credentials"),
    "signaturedoesnotmatch": (
        "{endpoint} refuses the signature, so the secret does not belong to the access key; {fix_credentials}",
        "storage/credentials",
    ),
    "nocredentials": (
        "no credentials for {endpoint}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.anonymous",
        "storage/credentials",
    ),
    "expiredtoken": (
        "the session token has expired at {endpoint}; renew AWS_SESSION_TOKEN and the keys that go with it",
        "storage/credentials",
    ),
    "invalidtoken": (
        "{endpoint} refuses the session token; renew AWS_SESSION_TOKEN, or unset it",
        "storage/credentials",
    ),
    "requesttimetooskewed": (
        "{endpoint} refuses the time of the request; set the clock of this machine",
        "storage/clock",
    ),
    "nosuchbucket": ("{endpoint} has no bucket {bucket}; make it, or correct the URI", "storage/no-bucket"),
    "region": (
        "region {region} is not the bucket's{right_region}; set storage.region (or AWS_REGION)",
        "storage/region",
    ),
    "busy": (
        "{endpoint} is overloaded or down ({detail}); try again, a run itself waits for about a minute",
        "storage/busy",
    ),
    "otherstore": ("{endpoint} answers, but not as an S3 store ({detail}); {fix_endpoint}", "storage/not-s3"),
    "nohost": ("no host of the name {host} is known{style}; {fix_endpoint}", "storage/unreachable"),
    "refused": ("{endpoint} refuses the connection; start the store, or {fix_endpoint}", "storage/unreachable"),
    "silent": ("{endpoint} does not answer; start the store, or {fix_endpoint}", "storage/unreachable"),
    "networkconnection": (
        "no connection to {endpoint} ({detail}); start the store, or {fix_endpoint}",
        "storage/unreachable",
    ),
    "notls": ("{endpoint} does not speak TLS there; write http://, or {fix_endpoint}", "storage/tls"),
    "nohttp": ("{endpoint} does not speak HTTP there; write https://, or {fix_endpoint}", "storage/tls"),
    "untrusted": (
        "the certificate of {endpoint} is not trusted here; add its authority to this machine's, or {fix_endpoint}",
        "storage/tls",
    ),
}
OF_THE_PLACE = {
    "full": ("{endpoint} has no room left ({detail}); make room there, or raise the quota", "storage/full"),
    "accessdenied": ("{endpoint} denies {operation}; {fix_access}", "storage/denied"),
    "nosuchkey": ("nothing is there; correct the URI", "storage/not-found"),
    "other": ("{endpoint} fails ({detail})", "storage/failed"),
}
OF_THIS_MACHINE = {
    "EACCES": ("choose another place, or change its rights", "storage/denied"),
    "EPERM": ("choose another place, or change its rights", "storage/denied"),
    "EROFS": ("choose a place that can be written", "storage/denied"),
    "ENOSPC": ("make room, or choose another place", "storage/full"),
    "EDQUOT": ("make room, or choose another place", "storage/full"),
    "ENOENT": ("correct the path", "storage/not-found"),
    "ENOTDIR": ("correct the path", "storage/not-found"),
    "EISDIR": ("correct the path", "storage/not-a-file"),
    "EEXIST": ("choose another place", "storage/failed"),
}
"""How to fix an error of the operating system, and its code."""
LASTING = {"full", "denied", "credentials", "no-bucket", "not-found", "not-a-file"}
"""Codes below storage/ of what does not pass by itself while a run writes; all others of S3 may be an outage."""
DISK_ELSEWHERE = {"EIO", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "EREMOTEIO"}
"""Errors of a disk of another machine, such as NFS, that is away."""


@dataclass(frozen=True)
class Complaint:
    """`text`: one line, without its code. `busy`: the store is there and may serve the same request later."""

    text: str
    code: str | None
    busy: bool = False


def explain(uri: str | None, error: BaseException) -> InputError:
    """An OSError of a place, or an error of botocore's, for the user; without a URI, it names the one of the error."""
    found = complaint(uri, error)
    return InputError(found.text, found.code)


def complaint(uri: str | None, error: BaseException) -> Complaint:
    """As `explain`, and whether it may pass by itself."""
    message = " ".join(str(error).split())
    uri = uri or _uri_in(message)
    code = _code(message, error)
    if code is not None:
        messages = " ".join(" ".join(str(cause).split()) for cause in _chain(error))
        return _of_s3(uri or S3_SCHEME, _kind(code, messages), code, messages)
    if uri is not None and storage.is_s3(uri) and isinstance(error, FileNotFoundError):
        return _of_s3(uri, "nosuchkey", "", message)
    text, stable = _of_this_machine(uri, error, message)
    return Complaint(without_secrets(text), stable)


def is_outage(error: OSError) -> bool:
    """Whether a store does not serve now what it may serve later."""
    message = " ".join(str(error).split())
    if _code(message, error) is not None:
        return str(complaint(None, error).code).removeprefix("storage/") not in LASTING
    if message.startswith(S3_SCHEME):  # `storage.ask_s3`
        return any(isinstance(cause, TimeoutError | ConnectionError) for cause in _chain(error))
    return errno.errorcode.get(error.errno or 0) in DISK_ELSEWHERE


PLACE = re.compile(r"(?:local file|does not exist) '([^']+)'|^(s3://\S+): ")
"""Where messages of pyarrow's, and of `storage.ask_s3`, name a place."""


def unwritable(folder: str, error: OSError, saved: str) -> UnwritablePlace | None:
    """The end of what writes into `folder`, when the error says that it cannot be written any more; None for an outage, and
    for another place. saved: what was saved before."""
    place = _place_of(error)
    if place is not None and not f"{place}/".startswith(f"{folder}/"):
        return None
    found = complaint(folder, error)
    if str(found.code).removeprefix("storage/") not in LASTING:
        return None
    reason, _, fix = found.text.rpartition("; ")
    free = ""
    if found.code == "storage/full" and not storage.is_s3(folder):
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free)"
    return UnwritablePlace(f"{reason}{free}; {saved}; {fix}, then the same command continues", "stage/unwritable")


@contextlib.contextmanager
def refuse_unwritable(folder: str) -> Iterator[None]:
    """Raises UnwritablePlace when what is inside it cannot be written into the folder any more."""
    try:
        yield
    except OSError as error:
        if (refusal := unwritable(folder, error, "what is finished is kept")) is not None:
            raise refusal from error
        raise


def _place_of(error: OSError) -> str | None:
    """The path or URI that the error names."""
    named = next((name for cause in _chain(error) if (name := getattr(cause, "filename", None))), None)
    if isinstance(named, str | os.PathLike):
        return os.fspath(named)
    text = " ".join(str(error).split())
    if found := PLACE.search(text):
        place = found[1] or found[2]
        return place if place.startswith(("/", S3_SCHEME)) else S3_SCHEME + place
    return _uri_in(text)


def without_secrets(text: str) -> str:
    """The text without this process's credentials, and without those in its URLs."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "…")
    return redact(text)


def _of_s3(uri: str, kind: str, code: str, message: str) -> Complaint:
    bucket = uri.removeprefix(S3_SCHEME).partition("/")[0]
    place = f"{S3_SCHEME}{bucket}" if kind in OF_THE_STORE else uri
    template, stable = (OF_THE_STORE | OF_THE_PLACE)[kind]
    text = f"{place}: {template.format_map(_words(bucket, code, message))}"
    return Complaint(without_secrets(text), stable, kind == "busy")


def _words(bucket: str, code: str, message: str) -> dict[str, str]:
    """What the templates may name: values of the settings, never of credentials."""
    variables = storage.environment(StorageSettings())
    endpoint = variables.get("AWS_ENDPOINT_URL_S3")
    right = re.search(r"(?:expecting|located in) '([\w-]+)'", message)
    host = re.search(r"resolve host(?:name)?: ([^\s,;]+)", message)
    return {
        "bucket": bucket,
        "detail": _detail(code, message),
        "endpoint": f"endpoint {endpoint}" if endpoint else "AWS S3",
        "host": host[1] if host else endpoint or "AWS S3",
        "fix_access": _fix_access(message),
        "fix_credentials": _fix_credentials(),
        "fix_endpoint": f"correct storage.endpoint (or AWS_ENDPOINT_URL{'' if endpoint else ', which is not set'})",
        "operation": _operation(message) or "access",
        "region": variables.get("AWS_REGION", "us-east-1, the default,"),
        "right_region": f", which is {right[1]}" if right else "",
        "style": f" (storage.addressing_style is {variables[STYLE_VARIABLE]})" if STYLE_VARIABLE in variables else "",
    }


def _fix_credentials() -> str:
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a pair of that store"
    where = f"profile {os.environ['AWS_PROFILE']}" if "AWS_PROFILE" in os.environ else "this machine's profile or role"
    return f"correct {where}, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def _fix_access(message: str) -> str:
    operation = _operation(message)
    permission = PERMISSIONS.get(operation, f"s3:{operation}" if operation else "access")
    if ANONYMOUS_VARIABLE in storage.environment(StorageSettings()):
        return f"allow {permission} to everybody, or set storage.anonymous to false and give credentials"
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        return f"allow {permission} to this machine's role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    doubt = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or " if "No response body" in message else ""
    return f"{doubt}allow {permission} to the owner of AWS_ACCESS_KEY_ID, or correct the URI"


def _operation(message: str) -> str:
    found = re.search(r"during (\w+) operation|calling the (\w+) operation", message)
    return (found[1] or found[2]) if found else ""


def _detail(code: str, message: str) -> str:
    """The code, or what curl said, and the store's own words."""
    curl = re.search(r"curlCode: \d+, ([^;]+)", message)
    words = re.search(r"Message: (.*)|operation: (?!curlCode|Unable|No response)(.+)", message)
    own = (words[1] or words[2]) if words else ""
    return curl[1] if curl else ": ".join(part for part in (code, own) if part)


def _kind(code: str, message: str) -> str:
    """The entry of OF_THE_STORE or OF_THE_PLACE that a code stands for."""
    plain = code.replace("_", "").lower()
    if plain in REGION_CODES or "while the bucket is located in" in message:
        return "region"
    if plain in BUSY_CODES:
        return "busy"
    if plain in FULL_CODES:
        return "full"
    if plain in OTHER_STORE_CODES:
        return "otherstore"
    plain = {"403": "accessdenied", "forbidden": "accessdenied"}.get(plain, plain)
    return plain if plain in OF_THE_STORE or plain in OF_THE_PLACE else "other"


def _code(message: str, error: BaseException) -> str | None:
    """The S3 error code, or a name for what the connection did; None for an error that is not of S3."""
    for cause in _chain(error):
        if isinstance(response := getattr(cause, "response", None), dict) and "Error" in response:
            return str(response["Error"].get("Code", "other"))
        if type(cause).__module__.startswith("botocore") and (kind := BOTOCORE.get(type(cause).__name__)):
            return kind
    found = re.search(r"AWS Error (\w+)", message)
    if found is None:
        return None
    named, status = re.search(r"ExceptionName: (\w+)", message), re.search(r"HTTP status (\d+)", message)
    curl = re.search(r"curlCode: (\d+)", message)
    if curl:
        return CURL.get(curl[1], "networkconnection")
    return (named or status or found)[1]


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _uri_in(message: str) -> str | None:
    """The URI that a message of pyarrow's speaks of."""
    bucket, key = re.search(r"bucket '([^']*)'", message), re.search(r"key '([^']*)' in bucket", message)
    return f"{S3_SCHEME}{bucket[1]}/{key[1] if key else ''}".rstrip("/") if bucket else None


def _of_this_machine(uri: str | None, error: BaseException, message: str) -> tuple[str, str]:
    """The line and its code."""
    if found := re.search(r"'([^']+)' is a directory", message):  # pyarrow's
        return f"{uri or found[1]}: is a folder; name a file", "storage/not-a-file"
    if found := re.search(r"file '([^']+)'.*\[errno (\d+)\]", message):  # pyarrow's, which sets no errno
        error = OSError(int(found[2]), os.strerror(int(found[2])), found[1])
    number: Any = getattr(error, "errno", None)
    if not isinstance(error, OSError) or not isinstance(number, int) or not error.strerror:
        return f"{uri}: {message}" if uri and uri not in message else message, "storage/failed"
    place = uri or (os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else None)
    fix, code = OF_THIS_MACHINE.get(errno.errorcode.get(number, ""), (None, "storage/failed"))
    if place is None or fix is None:
        return re.sub(r"^\[Errno -?\d+\] ", "", f"{place}: {message}" if uri else message), code
    return f"{place}: {os.strerror(number).lower()}; {fix}", code
