"""What a store must do for `storage.write_if_unchanged`, whichever store it is."""

import pytest

from threestage.data import storage


def one_of_two_writes(uri: str) -> None:
    """Of writers that read the same, one replaces the file."""
    assert storage.write_if_unchanged(uri, None, b"1") and not storage.write_if_unchanged(uri, None, b"2")
    assert storage.read_bytes(uri) == b"1" and not storage.write_if_unchanged(uri, b"2", b"3")
    assert storage.write_if_unchanged(uri, b"1", b"2") and not storage.write_if_unchanged(uri, b"1", b"3")
    assert storage.read_bytes(uri) == b"2" and not storage.write_if_unchanged(f"{uri}.absent", b"1", b"2")


def the_store_compares(uri: str, before: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client writes between the comparison here and the request: the store refuses every form of the condition."""
    if before is not None:
        storage.write_bytes(uri, before)
    ask_s3, refused = storage.ask_s3, []

    def overtaken(operation: str, bucket: str, **arguments: object) -> object:
        if operation != "put_object":
            return ask_s3(operation, bucket, **arguments)
        storage.write_bytes(uri, b"theirs")
        with pytest.raises(OSError) as error:
            ask_s3(operation, bucket, **arguments)
        assert storage.read_bytes(uri) == b"theirs"
        refused.append(error.value)
        if before is not None:
            storage.write_bytes(uri, before)  # the next form is tried then
        raise error.value

    monkeypatch.setattr(storage, "ask_s3", overtaken)
    storage.write_if_unchanged(uri, before, b"ours")
    assert len(refused) == (1 if before is None else 2)
