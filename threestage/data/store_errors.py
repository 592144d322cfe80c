"""What a storage library raises, as one line: what is wrong, where, and what mends it. No line holds a credential."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from threestage.data import storage
from threestage.data.storage import ANONYMOUS_VARIABLE, S3_SCHEME, STYLE_VARIABLE, StorageSettings
from threestage.redaction import redact

SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
SHORTEST_SECRET = 8
PERMISSIONS = {
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "CreateMultipartUpload": "s3:PutObject",
}

BUSY_CODES = {"slowdown", "serviceunavailable", "internalerror", "toomanyrequests", "429", "500", "502", "503", "504"}
REGION_CODES = {"authorizationheadermalformed", "permanentredirect", "illegallocationconstraintexception", "301"}
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
    "invalidaccesskeyid": "{endpoint} does not know the access key: {mend_credentials}",
    "signaturedoesnotmatch": "{endpoint} refuses the signature, so the secret does not belong to the access key: "
    "{mend_credentials}",
    "expiredtoken": "the session token has expired at {endpoint}: renew AWS_SESSION_TOKEN and the keys that go with it",
    "invalidtoken": "{endpoint} refuses the session token: renew AWS_SESSION_TOKEN, or unset it",
    "requesttimetooskewed": "{endpoint} refuses the time of the request: set the clock of this machine",
    "nosuchbucket": "{endpoint} has no bucket {bucket}: make it, or mend the URI",
    "nocredentials": "no credentials for {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.anonymous",
    "region": "region {region} is not the bucket's{right_region}: set storage.region (or AWS_REGION)",
    "busy": "{endpoint} is overloaded or down ({detail}): try again; a run itself waits for about a minute",
    "otherstore": "{endpoint} answers, but not as an S3 store ({detail}): {mend_endpoint}",
    "nohost": "no host of the name {host} is known{style}: {mend_endpoint}",
    "refused": "{endpoint} refuses the connection: start the store, or {mend_endpoint}",
    "silent": "{endpoint} does not answer: start the store, or {mend_endpoint}",
    "notls": "{endpoint} does not speak TLS there: write http://, or {mend_endpoint}",
    "untrusted": "the certificate of {endpoint} is not trusted here: add its authority to this machine's, or "
    "{mend_endpoint}",
    "nohttp": "{endpoint} does not speak HTTP there: write https://, or {mend_endpoint}",
    "networkconnection": "no connection to {endpoint} ({detail}): start the store, or {mend_endpoint}",
}
OF_THE_PLACE = {
    "accessdenied": "{endpoint} denies {operation}: {mend_access}",
    "nosuchkey": "nothing is there: mend the URI",
    "other": "{endpoint} fails ({detail})",
}
LOCAL_MENDS = {
    "EACCES": "choose another place, or change its rights",
    "EPERM": "choose another place, or change its rights",
    "EROFS": "choose a place that can be written",
    "ENOSPC": "make room, or choose another place",
    "EDQUOT": "make room, or choose another place",
    "ENOENT": "mend the path",
    "ENOTDIR": "mend the path",
    "EISDIR": "mend the path",
    "EEXIST": "choose another place",
}


@dataclass(frozen=True)
class Complaint:
    """`text`: one line. `busy`: the store is there and may serve the same request later."""

    text: str
    busy: bool = False


def explain(uri: str | None, error: BaseException) -> str:
    """One line for an OSError of a place, or for an error of botocore's; without a URI, the one that the error names."""
    return complaint(uri, error).text


def complaint(uri: str | None, error: BaseException) -> Complaint:
    """As `explain`, and whether it may pass by itself."""
    message = " ".join(str(error).split())
    uri = uri or _uri_in(message)
    code = _code(message, error)
    if code is not None:
        told = " ".join(" ".join(str(cause).split()) for cause in _chain(error))
        return _of_s3(uri or S3_SCHEME, _kind(code, told), code, told)
    if uri is not None and storage.is_s3(uri) and isinstance(error, FileNotFoundError):
        return _of_s3(uri, "nosuchkey", "", message)
    return Complaint(without_secrets(_of_this_machine(uri, error, message)))


def without_secrets(text: str) -> str:
    """The text without this process's credentials, and without those in its URLs."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "…")
    return redact(text)


def _of_s3(uri: str, kind: str, code: str, message: str) -> Complaint:
    bucket = uri.removeprefix(S3_SCHEME).partition("/")[0]
    place, template = (
        (f"{S3_SCHEME}{bucket}", OF_THE_STORE[kind]) if kind in OF_THE_STORE else (uri, OF_THE_PLACE[kind])
    )
    text = f"{place}: {template.format_map(_words(bucket, code, message))}"
    return Complaint(without_secrets(text), kind == "busy")


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
        "mend_access": _mend_access(message),
        "mend_credentials": _mend_credentials(),
        "mend_endpoint": f"mend storage.endpoint (or AWS_ENDPOINT_URL{'' if endpoint else ', which is not set'})",
        "operation": _operation(message) or "access",
        "region": variables.get("AWS_REGION", "us-east-1, the default,"),
        "right_region": f", which is {right[1]}" if right else "",
        "style": f" (storage.addressing_style is {variables[STYLE_VARIABLE]})" if STYLE_VARIABLE in variables else "",
    }


def _mend_credentials() -> str:
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a pair of that store"
    where = f"profile {os.environ['AWS_PROFILE']}" if "AWS_PROFILE" in os.environ else "this machine's profile or role"
    return f"mend {where}, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def _mend_access(message: str) -> str:
    operation = _operation(message)
    permission = PERMISSIONS.get(operation, f"s3:{operation}" if operation else "access")
    if ANONYMOUS_VARIABLE in storage.environment(StorageSettings()):
        return f"allow {permission} to everybody, or set storage.anonymous to false and give credentials"
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        return f"allow {permission} to this machine's role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    doubt = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or " if "No response body" in message else ""
    return f"{doubt}allow {permission} to the owner of AWS_ACCESS_KEY_ID, or mend the URI"


def _operation(message: str) -> str:
    found = re.search(r"during (\w+) operation|calling the (\w+) operation", message)
    return (found[1] or found[2]) if found else ""


def _detail(code: str, message: str) -> str:
    """The code, or what curl said, and the store's own words."""
    curl = re.search(r"curlCode: \d+, ([^;]+)", message)
    words = re.search(r"Message: (.*)|operation: (?!curlCode|Unable|No response)(.+)", message)
    said = (words[1] or words[2]) if words else ""
    return curl[1] if curl else ": ".join(part for part in (code, said) if part)


def _kind(code: str, message: str) -> str:
    """The entry of OF_THE_STORE or OF_THE_PLACE that a code stands for."""
    plain = code.replace("_", "").lower()
    if plain in REGION_CODES or "while the bucket is located in" in message:
        return "region"
    if plain in BUSY_CODES:
        return "busy"
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


def _of_this_machine(uri: str | None, error: BaseException, message: str) -> str:
    if found := re.search(r"'([^']+)' is a directory", message):  # pyarrow's
        return f"{uri or found[1]}: is a folder: name a file"
    if found := re.search(r"file '([^']+)'.*\[errno (\d+)\]", message):  # pyarrow's, which sets no errno
        error = OSError(int(found[2]), os.strerror(int(found[2])), found[1])
    number: Any = getattr(error, "errno", None)
    if not isinstance(error, OSError) or not isinstance(number, int) or not error.strerror:
        return f"{uri}: {message}" if uri and uri not in message else message
    import errno

    place = uri or (os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else None)
    mend = LOCAL_MENDS.get(errno.errorcode.get(number, ""))
    if place is None or mend is None:
        return re.sub(r"^\[Errno -?\d+\] ", "", f"{place}: {message}" if uri else message)
    return f"{place}: {os.strerror(number).lower()}: {mend}"
