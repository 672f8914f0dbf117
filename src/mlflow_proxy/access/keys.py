"""Who calls, by API key: looks a shown key up among those of the keys file and the secret, and keeps both up to date.

Each source is looked at again and again by a thread of its own, because files on a network share and AWS can block for
long; a request only reads what the last look left. Keys that were good stay good until a readable source says
otherwise. How keys are written is in `key_record`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.kept_keys import KeptKeys
from mlflow_proxy.access.key_record import KEY, TEXT_MAX, Key, KeysError, parse_keys, usable_lines
from mlflow_proxy.access.key_secret import SecretMissing, fetch_secret
from mlflow_proxy.errors import Refusal
from mlflow_proxy.settings import Access, Aws

# All in seconds.
_FILE_INTERVAL = 1.0
_START_DEADLINE = 35.0
_FIRST_RETRY = 2.0
# Between two log lines about a source that goes on failing.
_REMIND = 60.0

logger = logging.getLogger(__name__)


class _Held(NamedTuple):
    """A key in the form in which it is looked up: all that a request needs is worked out."""

    key: Key | None
    digest: bytes
    valid_until: float
    caller: Caller


# What an unknown id is compared with, so that it takes as long as a known one with a wrong secret.
_NOBODY = _Held(None, secrets.token_bytes(32), 0.0, Caller("nobody", "key"))


class KeyRing:
    """The keys that count now. Made, started and closed in one event loop; `identify` in any thread."""

    def __init__(
        self,
        access: Access,
        aws: Aws,
        *,
        proxy: str | None = None,
        kept: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`kept` is the folder in which all workers keep the keys that they read last; None: each its own."""
        self._clock = clock
        self._sources: list[_Source] = []
        self._clashes: frozenset[str] = frozenset()
        intervals = {"access.keys_file": _FILE_INTERVAL, "access.keys_secret": access.keys_refresh}
        for origin in key_origins(access, aws, proxy=proxy):
            name = f"{origin.option} {origin.place}"
            store = None if kept is None else KeptKeys(kept, name)
            self._sources.append(
                _Source(name, origin.read, intervals[origin.option], changed=self._changed, kept=store)
            )

    async def start(self) -> None:
        """Load the keys, then watch for changes. A source that cannot be read is logged and holds no keys, for now."""
        looks = [asyncio.wrap_future(source.start()) for source in self._sources]
        if looks and (await asyncio.wait(looks, timeout=_START_DEADLINE))[1]:
            logger.error("API keys: a source has not answered for %.0f s; going on without its keys", _START_DEADLINE)

    async def close(self) -> None:
        """Stop watching. A look that is under way is not waited for; it ends by its own deadline."""
        for source in self._sources:
            source.stop()

    def identify(self, key: str) -> Caller:
        """Who the caller with this key is. Raises Unauthenticated, and Refusal 503 if it may be one of those that
        cannot be read.
        """
        match = KEY.fullmatch(key)
        if match is None:
            raise Unauthenticated("what was shown is not an API key")
        key_id = match[1]
        held = _NOBODY
        for source in self._sources:
            found = source.held.get(key_id)
            if found is not None:
                held = found
                break
        right = hmac.compare_digest(sha256(key.encode()).digest(), held.digest)
        if right and self._clock() < held.valid_until:
            return held.caller
        if held.key is None and any(source.unreadable for source in self._sources):
            raise Refusal(
                503, "The proxy cannot read its API keys at the moment. Try again later.", retry_after=5, in_log=True
            )
        raise Unauthenticated(_refusal(key_id, held, right=right))

    def _changed(self) -> None:
        """Log which ids are in both sources, once. In the thread of the source that changed."""
        ids = [source.held.keys() for source in self._sources]
        clashes = frozenset(ids[0] & ids[1]) if len(ids) > 1 else frozenset()
        if clashes - self._clashes:
            listed = ", ".join(sorted(clashes))
            logger.warning(
                "ids of API keys in both access.keys_file and access.keys_secret: %s; the file's count", listed
            )
        self._clashes = clashes


def _refusal(key_id: str, held: _Held, *, right: bool) -> str:
    if held.key is None:
        return f"there is no API key {key_id}"
    if not right:
        return f"the secret of API key {key_id} is wrong"
    if held.key.revoked is not None:
        return f"API key {key_id} was revoked"
    return f"API key {key_id} has {'expired' if held.key.ends is None else 'ended after its rotation'}"


class Origin(NamedTuple):
    """One place that keys come from: the option that names it, its value, and how it is read."""

    option: str
    place: str
    read: Callable[[], bytes | None]  # gives None while nothing has changed


def key_origins(access: Access, aws: Aws, *, proxy: str | None) -> Iterator[Origin]:
    """The places that the configuration names. Reading one blocks, and raises KeysError, Missing or SecretMissing."""
    if access.keys_file is not None:
        yield Origin("access.keys_file", str(access.keys_file), _FileReader(access.keys_file).read)
    if access.keys_secret is not None:
        fetch = partial(fetch_secret, access.keys_secret, aws, proxy=proxy)
        yield Origin("access.keys_secret", access.keys_secret, _SecretReader(fetch).read)


def read_all_keys(access: Access, aws: Aws, *, proxy: str | None, kept: Path) -> tuple[dict[str, bytes], list[str]]:
    """What each option's source holds now, as a digest, and what is wrong with those that cannot be used.

    If nothing is, workers that start from now on have these keys even if they cannot read them. Blocks.
    """
    digests: dict[str, bytes] = {}
    problems: list[str] = []
    read: list[tuple[KeptKeys, list[Key]]] = []
    for origin in key_origins(access, aws, proxy=proxy):
        try:
            text = origin.read() or b""
            store = KeptKeys(kept, f"{origin.option} {origin.place}")
            read.append((store, list(parse_keys(text).values())))
            digests[origin.option] = sha256(text).digest()
        except (KeysError, Missing, SecretMissing) as error:
            problems.append(f"{origin.option}: {origin.place} {error}")
    for store, keys in () if problems else read:
        store.save(keys)
    return digests, problems


class Missing(Exception):
    """A source is not there, or empty: as a file is for a moment when somebody writes it anew in place."""


class _Source:
    """One place that keys come from, the keys that it held last, and the thread that looks."""

    def __init__(
        self,
        name: str,
        read: Callable[[], bytes | None],
        interval: float,
        *,
        changed: Callable[[], None],
        kept: KeptKeys | None = None,
    ) -> None:
        self._kept = kept
        # Replaced as a whole, so that readers need no lock.
        self.held: Mapping[str, _Held] = {key.id: _hold(key, None) for key in kept.load()} if kept else {}
        self._name = name
        self._read = read  # gives None while nothing has changed
        self._interval = interval
        self._changed = changed
        self._stopped = threading.Event()
        self._looked: Future[None] = Future()
        self._failed = 0  # reads in a row
        self._missing = False  # at the last look
        self._complaint = ""
        self._complained = 0.0

    @property
    def unreadable(self) -> bool:
        """It is there and was never read, so that nobody knows its keys."""
        return not self.held and self._failed > 0 and not self._missing

    def start(self) -> Future[None]:
        """Begin to look; the future is done after the first look."""
        threading.Thread(target=self._watch, name="api-keys", daemon=True).start()
        return self._looked

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self._look()
            if not self._looked.done():
                self._looked.set_result(None)
            self._stopped.wait(self._pause())

    def _pause(self) -> float:
        """Seconds until the next look; less after failures, and spread so that workers don't ask together."""
        retry = _FIRST_RETRY * 2 ** min(self._failed - 1, 12) if self._failed else self._interval
        return float(min(self._interval, retry) * random.uniform(0.9, 1.1))  # noqa: S311

    def _look(self) -> None:
        try:
            text = self._read()
            self._failed = 0
            self._missing = False
            if text is not None:
                self._take(text)
            elif self._complaint:  # about a text that is still the same
                self._complain(self._complaint)
        except (Missing, SecretMissing) as missing:
            self._failed += 1
            if self._missing or not self.held:
                self._complain(str(missing))
            self._missing = True
        except Exception as error:  # without the thread no change would ever be seen; its text may hold a secret
            self._failed += 1
            self._missing = False
            self._complain(str(error) if isinstance(error, KeysError) else f"failed with {type(error).__name__}")

    def _take(self, text: bytes) -> None:
        """Hold the keys in a new text. Raises KeysError if one of them cannot be used; then keys can only end."""
        self._complaint = ""  # which was about another text
        before = self.held
        try:
            keys = parse_keys(text)
        except KeysError:
            self._restrict(text)
            raise
        self._hold_all({key.id: _hold(key, before.get(key.id)) for key in keys.values()})
        logger.info("%s: API keys: %d", self._name, len(self.held))
        self._changed()

    def _hold_all(self, held: Mapping[str, _Held]) -> None:
        self.held = held
        if self._kept is not None:
            self._kept.save(each.key for each in held.values() if each.key is not None)

    def _restrict(self, text: bytes) -> None:
        """Revoke and end those held keys of which a usable line of a broken text says so; all else is left."""
        ended: dict[str, _Held] = {}
        for key in usable_lines(text):
            held = ended.get(key.id) or self.held.get(key.id)
            if held is not None and held.key is not None:
                restricted = held.key.restricted_by(key)
                if restricted.valid_until < held.valid_until:
                    ended[key.id] = _hold(restricted, held)
        if ended:
            self._hold_all({**self.held, **ended})
            listed = ", ".join(sorted(ended))
            logger.warning("%s: lines that can be used revoke or end the API keys %s", self._name, listed)

    def _complain(self, reason: str) -> None:
        """Log what is wrong: at once if it is new, else once a minute."""
        now = time.monotonic()
        if reason != self._complaint or now - self._complained >= _REMIND:
            kept = "the keys read before still count" if self.held else "it gives no keys"
            logger.error("%s: %s; %s", self._name, reason, kept)
            self._complaint, self._complained = reason, now


def _hold(key: Key, before: _Held | None) -> _Held:
    """A key as it is looked up; what is held of it already stays the same object."""
    if before is not None and before.key == key:
        return before
    caller = Caller(subject=f"key:{key.name}", way="key", role=key.role, credential=key.id)
    return _Held(key, bytes.fromhex(key.sha256), key.valid_until, caller)


class _FileReader:
    """Reads a keys file when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None

    def read(self) -> bytes | None:
        """The file's text, or None if it is as at the last look. Raises KeysError, or Missing."""
        seen, self._seen = self._seen, None  # after a failure all is read again
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
            if stamp == seen:
                self._seen = seen
                return None
            if not stat.S_ISREG(found.st_mode) or found.st_size > TEXT_MAX:
                raise KeysError(f"is not a file of up to {TEXT_MAX} bytes")
            with self._path.open("rb") as file:
                text = file.read(TEXT_MAX)
        except (FileNotFoundError, NotADirectoryError):
            raise Missing("does not exist; `mlflow-proxy keys new` makes it") from None
        except OSError as error:
            raise KeysError(f"cannot be read ({error.strerror}); let the service's user read it") from None
        if not text:
            raise Missing("is empty; `mlflow-proxy keys new` adds keys")
        if found.st_mode & stat.S_IWOTH:
            logger.warning("%s can be changed by every user of this machine; chmod 600 it", self._path)
        self._seen = stamp
        return text


class _SecretReader:
    """Fetches the secret, and tells whether it has changed."""

    def __init__(self, fetch: Callable[[], bytes]) -> None:
        self._fetch = fetch
        self._seen = b""

    def read(self) -> bytes | None:
        """The secret's text, or None if it is as at the last look. Raises KeysError, or SecretMissing."""
        seen, self._seen = self._seen, b""  # after a failure all is read again
        text = self._fetch()
        self._seen = sha256(text).digest()
        return None if self._seen == seen else text
