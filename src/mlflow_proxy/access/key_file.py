"""The file that API keys are kept in, one line each: read and changed as a whole, also by several commands at once.

For the command line; the service reads it in `keys`. What stands in a line is in `key_record`.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_proxy.access.key_record import KEYS_MAX, TEXT_MAX, Key, KeysError, parse_keys

# Both in seconds.
_LOCK_DEADLINE = 30.0
_LOCK_INTERVAL = 0.02


def read_keys(path: Path) -> list[Key]:
    """The keys in a file, in its order. Raises KeysError."""
    try:
        with path.open("rb") as file:
            text = file.read(TEXT_MAX + 1)
    except FileNotFoundError:
        raise KeysError(f"{path} does not exist; `mlflow-proxy keys new` makes it") from None
    except OSError as error:
        raise KeysError(f"{path} cannot be read ({error.strerror})") from None
    return _parse_file(path, text)


def _parse_file(path: Path, text: bytes) -> list[Key]:
    if len(text) > TEXT_MAX:
        raise KeysError(f"{path} is larger than {TEXT_MAX} bytes, so it is no keys file")
    try:
        return list(parse_keys(text).values())
    except KeysError as error:
        raise KeysError(f"{path}, {error}") from None


@contextmanager
def change_keys(path: Path, *, create: bool = False) -> Iterator[list[Key]]:
    """The keys of a file, to be changed in place; what the list then holds is written when the block ends well.

    Other commands wait meanwhile; readers see all of the change or nothing. A file that is made has mode 0600, one that
    exists keeps mode and owner. Raises KeysError.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    try:
        with _locked(path, create=create) as descriptor:
            with open(descriptor, "rb", closefd=False) as file:
                keys = _parse_file(path, file.read(TEXT_MAX + 1))
            before = list(keys)
            yield keys
            if keys != before:
                if len(keys) > KEYS_MAX:
                    raise KeysError(f"{path} would hold more than {KEYS_MAX} keys; remove the lines of revoked ones")
                _replace(path, "".join(json.dumps(key.fields()) + "\n" for key in keys), os.fstat(descriptor))
    except FileNotFoundError:
        what = "its folder does not exist" if create else "it does not exist; `mlflow-proxy keys new` makes it"
        raise KeysError(f"{path} cannot be changed: {what}") from None
    except OSError as error:
        raise KeysError(
            f"{path} cannot be changed ({error.strerror}); whoever changes keys must be able to write that file and "
            "its folder, since the file is replaced as a whole"
        ) from None


@contextmanager
def _locked(path: Path, *, create: bool) -> Iterator[int]:
    """An open descriptor of the file that now has this name, under a lock that other commands respect."""
    deadline = time.monotonic() + _LOCK_DEADLINE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        try:
            if _lock(descriptor) and _is_same_file(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)  # and with it the lock
        if time.monotonic() >= deadline:
            raise KeysError(f"{path} is being changed by another command for {_LOCK_DEADLINE:.0f} s; try again")
        time.sleep(_LOCK_INTERVAL)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether nobody replaced the file between opening and locking it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _replace(path: Path, text: str, before: os.stat_result) -> None:
    """Put a new file in the place of the old one, with its mode and owner; after a power cut it is one or the other."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            made = os.fstat(descriptor)
            if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
                os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, before.st_mode & 0o777)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
