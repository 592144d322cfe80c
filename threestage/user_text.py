"""Text files of users: UTF-8, with or without a byte order mark. Every such file is read by `text_of`."""

from threestage.errors import InputError

UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def text_of(content: bytes, where: str) -> str:
    """The text of a file's bytes.

    Raises InputError, which begins with `where` and names the first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = "it is UTF-16" if content.startswith(UTF_16_MARKS) else f"byte 0x{content[error.start]:02x} is not"
        raise InputError(
            f"{where}: not UTF-8 text: {found} (byte {error.start}, line {line}); save the file as UTF-8",
            "data/not-utf8",
        ) from None


def lines_of(content: bytes, where: str) -> list[str]:
    """The lines that are not empty, without the spaces around them. Raises InputError as `text_of`."""
    lines = (line.strip() for line in text_of(content, where).replace("\r", "\n").split("\n"))
    return [line for line in lines if line]
