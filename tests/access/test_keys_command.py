"""`mlflow-proxy keys`: what it prints, what it writes, many at once, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import resource
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlflow_proxy.access import key_file
from mlflow_proxy.access.caller import Caller, Unauthenticated
from mlflow_proxy.access.key_record import KEY, Key, KeysError, make_key, parse_keys
from mlflow_proxy.access.keys import KeyRing
from mlflow_proxy.keys_command import keys
from mlflow_proxy.settings import Access, Aws
from mlflow_proxy.telemetry import audit as audit_module

COMMAND = (str(Path(sys.executable).with_name("mlflow-proxy")), "keys")
SECRET_ARN = "arn:aws:secretsmanager:eu-central-1:111122223333:secret:mlflow-proxy/keys-AbCdEf"
TARGETS = (
    '[[targets]]\nname = "team"\narn = "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-tracking-server/team"\n'
)
ROLES = "".join(f'[[roles]]\nname = "{name}"\ntargets = ["*"]\nallow = ["*"]\n' for name in ("reader", "writer"))


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MLFLOW_PROXY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def config(tmp_path: Path, path: Path, audit: Path) -> Path:
    return configured(tmp_path, f'[access]\nkeys_file = "{path}"\n[audit]\nto = "{audit}"\n')


def configured(folder: Path, text: str, roles: str = ROLES) -> Path:
    file = folder / "proxy.toml"
    file.write_text(text + roles + TARGETS)
    return file


def run(*arguments: str | Path, **environ: str) -> Result:
    return CliRunner(env=environ).invoke(keys, [str(each) for each in arguments])


def new(path: Path, name: str = "ci-pipeline", *more: str) -> str:
    """Make a key; the key."""
    done = run("new", "--name", name, "--role", "writer", "--file", path, *more)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def rotate(path: Path, name: str = "ci-pipeline", *more: str) -> str:
    done = run("rotate", name, "--file", path, *more)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def failure(*arguments: str | Path, **environ: str) -> str:
    """What a command says that fails; it prints nothing on standard output."""
    done = run(*arguments, **environ)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.stdout == ""
    return done.stderr


def held(path: Path) -> list[Key]:
    return list(parse_keys(path.read_bytes()).values())


def put(path: Path, *kept: Key) -> None:
    path.write_text("".join(json.dumps(key.fields()) + "\n" for key in kept))


def identify(path: Path, key: str) -> Caller | None:
    """The caller that a service which starts now finds for a key."""
    ring = KeyRing(Access(keys_file=path), Aws())
    asyncio.run(ring.start())
    try:
        return ring.identify(key)
    except Unauthenticated:
        return None
    finally:
        asyncio.run(ring.close())


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def near(left: datetime | None, right: datetime) -> bool:
    return left is not None and abs(left - right) < timedelta(minutes=5)


class TestNew:
    def test_the_key_alone_is_on_standard_output(self, path: Path) -> None:
        done = run("new", "--name", "ci-pipeline", "--role", "writer", "--file", path)
        assert KEY.fullmatch(done.stdout.removesuffix("\n"))
        (key,) = held(path)
        assert key.sha256 == sha256(done.stdout.strip().encode()).hexdigest()
        assert (key.name, key.role) == ("ci-pipeline", "writer")
        assert near(key.created, now())
        assert f"Key {key.id} for ci-pipeline, role writer, valid until" in done.stderr
        assert "shown only this once" in done.stderr
        assert done.stdout.strip() not in done.stderr + path.read_text()

    def test_the_service_knows_it(self, path: Path) -> None:
        text = new(path)
        assert identify(path, text) == Caller("key:ci-pipeline", "key", role="writer", credential=held(path)[0].id)
        assert identify(path, text[:-1] + ("a" if text[-1] != "a" else "b")) is None

    @pytest.mark.parametrize(
        ("expires", "expected"),
        [("90d", timedelta(days=90)), ("12h", timedelta(hours=12)), ("30m", timedelta(minutes=30)), ("never", None)],
    )
    def test_expiry(self, path: Path, expires: str, expected: timedelta | None) -> None:
        new(path, "one", "--expires", expires)
        (key,) = held(path)
        assert key.expires == (key.created + expected if expected else None)

    def test_ninety_days_unless_said_otherwise(self, path: Path) -> None:
        new(path)
        assert held(path)[0].expires == held(path)[0].created + timedelta(days=90)

    @pytest.mark.parametrize("expires", ["90", "d", "0d", "-1d", "1.5h", "1w", "90 d", "999999d", "", "Never", "९d"])
    def test_durations_that_are_none(self, path: Path, expires: str) -> None:
        said = failure("new", "--name", "one", "--role", "writer", "--file", path, f"--expires={expires}")
        assert f"Invalid value for '--expires': {expires!r} is not a duration; write one like 90d, 12h or 30m" in said
        assert not path.exists()

    def test_it_is_put_behind_the_others(self, path: Path) -> None:
        made = [new(path, name) for name in ("one", "two", "three")]
        assert [key.name for key in held(path)] == ["one", "two", "three"]
        assert [key.sha256 for key in held(path)] == [sha256(each.encode()).hexdigest() for each in made]

    def test_a_name_stands_for_one_key(self, path: Path) -> None:
        new(path)
        before = path.read_bytes()
        said = failure("new", "--name", "ci-pipeline", "--role", "reader", "--file", path)
        assert f"there is a key named 'ci-pipeline' already, {held(path)[0].id}" in said
        assert "`mlflow-proxy keys rotate ci-pipeline`" in said
        assert path.read_bytes() == before

    @pytest.mark.parametrize("end", ["expires", "ends", "revoked"])
    def test_a_name_is_free_again_after_its_key(self, path: Path, end: str) -> None:
        past = now() - timedelta(days=2)
        old = make_key("ci-pipeline", "reader", created=past, expires=now() + timedelta(days=1))[1]
        put(path, Key(**{**{name: getattr(old, name) for name in Key.__slots__}, end: past}))
        assert identify(path, new(path)) is not None

    @pytest.mark.parametrize("name", ["a b", "ä", "a/b", "x" * 65, ""])
    def test_names_that_cannot_be(self, path: Path, name: str) -> None:
        assert "cannot be a key's name; use 1 to 64 letters" in failure(
            "new", "--name", name, "--role", "writer", "--file", path
        )

    def test_a_broken_file_is_left_alone(self, path: Path) -> None:
        new(path)
        with path.open("a") as file:
            file.write('{"hunter2": 1}\n')
        before = path.read_bytes()
        for command in (("new", "--name", "x", "--role", "writer"), ("revoke", "x"), ("rotate", "x"), ("list",)):
            said = failure(*command, "--file", path)
            assert said == (
                f"Error: {path}, line 2: has a field that does not exist; there are id, name, sha256, role, created, "
                "expires, ends, revoked\n"
            )
        assert path.read_bytes() == before

    def test_no_folder(self, tmp_path: Path) -> None:
        said = failure("new", "--name", "x", "--role", "writer", "--file", tmp_path / "none" / "keys.jsonl")
        assert said.endswith("keys.jsonl cannot be changed: its folder does not exist\n")

    def test_a_folder(self, tmp_path: Path) -> None:
        said = failure("revoke", "x", "--file", tmp_path / "sub" / "..")
        assert "cannot be changed (Is a directory)" in said


class TestList:
    def test_states(self, path: Path) -> None:
        assert run("list", "--file", path).exit_code == 1
        time_ = now()
        day = timedelta(days=1)

        def kept(name: str, **more: Any) -> Key:
            made = make_key(name, "writer", created=time_ - 9 * day, expires=time_ + day)[1]
            return Key(**{**{slot: getattr(made, slot) for slot in Key.__slots__}, **more})

        put(
            path,
            kept("current"),
            kept("forever", expires=None),
            kept("late", expires=time_ - day),
            kept("old", ends=time_ + day / 2),
            kept("older", ends=time_ - day),
            kept("stolen", revoked=time_ - day),
        )
        done = run("list", "--file", path)
        assert done.exit_code == 0
        rows = [re.split(r"  +", line) for line in done.stdout.splitlines()]
        assert rows[0] == ["ID", "NAME", "ROLE", "CREATED", "EXPIRES", "STATE"]
        stamp = "%Y-%m-%dT%H:%M:%SZ"
        assert {row[1]: row[5] for row in rows[1:]} == {
            "current": "active",
            "forever": "active",
            "late": "expired",
            "old": f"ends {(time_ + day / 2).strftime(stamp)}",
            "older": "expired",
            "stolen": "revoked",
        }
        assert rows[1][0] == held(path)[0].id
        assert rows[1][3:5] == [(time_ - 9 * day).strftime(stamp), (time_ + day).strftime(stamp)]
        assert rows[2][4] == "never"
        listed = json.loads(run("list", "--json", "--file", path).stdout)
        assert [each["state"] for each in listed] == ["active", "active", "expired", "ends", "expired", "revoked"]
        assert set(listed[5]) == {"id", "name", "role", "created", "expires", "revoked", "state"}
        assert "sha256" not in done.stdout

    def test_nothing_is_changed_nor_recorded(self, path: Path, config: Path, audit: Path) -> None:
        new(path)
        before = path.stat()
        assert run("list", "--config", config).exit_code == 0
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert not audit.exists()


class TestRevoke:
    def test_by_id(self, path: Path) -> None:
        first, second = new(path, "first"), new(path, "second")
        done = run("revoke", held(path)[0].id, "--file", path)
        assert done.exit_code == 0
        assert done.stdout == ""
        assert f"Revoked key {held(path)[0].id} of first, role writer." in done.stderr
        assert near(held(path)[0].revoked, now())
        assert identify(path, first) is None
        assert identify(path, second) is not None

    def test_by_name_all_of_it(self, path: Path) -> None:
        old = new(path)
        fresh, other = rotate(path), new(path, "other")
        assert identify(path, old)
        done = run("revoke", "ci-pipeline", "--file", path)
        assert done.stderr.count("Revoked key") == 2
        assert [identify(path, key) is not None for key in (old, fresh, other)] == [False, False, True]

    def test_twice_is_no_mistake(self, path: Path) -> None:
        new(path)
        assert run("revoke", "ci-pipeline", "--file", path).exit_code == 0
        before = path.read_bytes()
        done = run("revoke", "ci-pipeline", "--file", path)
        assert done.exit_code == 0
        assert "ci-pipeline is revoked already; nothing changed." in done.stderr
        assert path.read_bytes() == before

    def test_an_id_counts_before_a_name(self, path: Path) -> None:
        new(path, "first")
        key_id = held(path)[0].id
        put(path, *held(path), make_key(key_id, "writer", created=now(), expires=None)[1])
        assert run("revoke", key_id, "--file", path).exit_code == 0
        assert [key.revoked is not None for key in held(path)] == [True, False]

    def test_nobody(self, path: Path) -> None:
        new(path)
        assert failure("revoke", "ci", "--file", path).endswith(
            f"there is no key 'ci' in {path}; `mlflow-proxy keys list` shows all\n"
        )

    def test_no_file(self, path: Path) -> None:
        for command in ("revoke", "rotate"):
            assert "it does not exist; `mlflow-proxy keys new` makes it" in failure(command, "ci", "--file", path)
        assert not path.exists()


class TestRotate:
    def test_old_and_new_count_during_the_overlap(self, path: Path) -> None:
        old = new(path, "ci-pipeline", "--expires", "30d")
        done = run("rotate", "ci-pipeline", "--overlap", "12h", "--file", path)
        fresh = done.stdout.strip()
        before, after = held(path)
        assert near(before.ends, now() + timedelta(hours=12))
        assert (after.name, after.role, after.ends) == ("ci-pipeline", "writer", None)
        assert after.expires == after.created + timedelta(days=30)
        assert f"The old key {before.id} counts until" in done.stderr
        assert f"mlflow-proxy keys revoke {before.id}" in done.stderr
        callers = [identify(path, key) for key in (old, fresh)]
        assert [caller.subject for caller in callers if caller] == ["key:ci-pipeline"] * 2

    def test_a_day_unless_said_otherwise(self, path: Path) -> None:
        new(path)
        rotate(path)
        assert near(held(path)[0].ends, now() + timedelta(days=1))

    @pytest.mark.parametrize(("more", "days"), [((), None), (("--expires", "7d"), 7), (("--expires", "never"), None)])
    def test_expiry_of_the_new_one(self, path: Path, more: tuple[str, ...], days: int | None) -> None:
        new(path, "ci-pipeline", "--expires", "never")
        rotate(path, "ci-pipeline", *more)
        key = held(path)[1]
        assert key.expires == (key.created + timedelta(days=days) if days else None)

    def test_an_overlap_lengthens_nothing(self, path: Path) -> None:
        new(path, "ci-pipeline", "--expires", "1h")
        rotate(path, "ci-pipeline", "--overlap", "30d")
        assert held(path)[0].ends == held(path)[0].expires
        rotate(path, "ci-pipeline", "--overlap", "10m")
        rotate(path, "ci-pipeline", "--overlap", "50m")
        ends = [key.ends for key in held(path)]
        assert near(ends[0], now() + timedelta(minutes=10))
        assert near(ends[1], now() + timedelta(minutes=10))
        assert near(ends[2], now() + timedelta(minutes=50))

    def test_the_newest_is_what_is_followed(self, path: Path) -> None:
        new(path, "ci-pipeline", "--expires", "10d")
        rotate(path, "ci-pipeline", "--expires", "20d")
        rotate(path)
        assert held(path)[2].expires == held(path)[2].created + timedelta(days=20)

    def test_only_what_is_valid(self, path: Path) -> None:
        new(path)
        run("revoke", "ci-pipeline", "--file", path)
        said = failure("rotate", "ci-pipeline", "--file", path)
        assert f"there is no valid key named 'ci-pipeline' in {path}" in said
        assert "`mlflow-proxy keys new --name ci-pipeline --role …` makes one" in said

    @pytest.mark.parametrize("overlap", ["never", "0h", "soon"])
    def test_overlaps_that_are_none(self, path: Path, overlap: str) -> None:
        new(path)
        assert "is not a duration" in failure("rotate", "ci-pipeline", "--file", path, "--overlap", overlap)


class TestConfiguration:
    def test_it_names_file_and_roles(self, config: Path, path: Path) -> None:
        done = run("new", "--name", "x", "--role", "writer", "--config", config)
        assert done.exit_code == 0, done.output
        assert held(path)[0].role == "writer"
        said = failure("new", "--name", "y", "--role", "wirter", "--config", config)
        assert said == "Error: there is no role 'wirter' in the configuration; there are reader, writer\n"
        assert len(held(path)) == 1

    def test_from_the_environment(self, config: Path, path: Path) -> None:
        environ = {"MLFLOW_PROXY_CONFIG": str(config)}
        assert run("new", "--name", "x", "--role", "writer", **environ).exit_code == 0
        assert "x" in run("list", **environ).stdout
        assert "there is no role" in failure("new", "--name", "y", "--role", "admin", **environ)
        targets = '[{"name": "team", "arn": "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-tracking-server/team"}]'
        roles = '[{"name": "writer", "targets": ["*"], "allow": ["*"]}]'
        alone = {"ACCESS__KEYS_FILE": str(path), "TARGETS": targets, "ROLES": roles}
        environ = {f"MLFLOW_PROXY_{name}": value for name, value in alone.items()}
        assert run("new", "--name", "y", "--role", "writer", **environ).exit_code == 0
        assert [key.name for key in held(path)] == ["x", "y"]

    def test_another_file_with_its_roles(self, config: Path, path: Path, tmp_path: Path) -> None:
        other = tmp_path / "copy.jsonl"
        done = run("new", "--name", "x", "--role", "reader", "--config", config, "--file", other)
        assert done.exit_code == 0
        assert held(other)[0].name == "x"
        assert not path.exists()
        assert "there is no role" in failure("new", "--name", "y", "--role", "no", "-c", config, "-f", other)

    def test_a_role_that_is_gone_is_not_rotated_into(self, config: Path, path: Path) -> None:
        new(path)
        config.write_text(config.read_text().replace('name = "writer"', 'name = "author"'))
        assert "there is no role 'writer'" in failure("rotate", "ci-pipeline", "--config", config)
        assert len(held(path)) == 1
        assert run("revoke", "ci-pipeline", "--config", config).exit_code == 0

    def test_neither_configuration_nor_file(self) -> None:
        said = failure("list")
        assert "name the configuration with --config, or a keys file with --file" in said

    def test_mistakes_are_listed(self, tmp_path: Path) -> None:
        config = configured(tmp_path, '[access]\nkeysfile = "x"\n[server]\nport = 0\n')
        said = failure("list", "--config", config)
        assert "the configuration has mistakes:\n" in said
        assert said.count("  ✗ ") == 2

    def test_no_keys_file(self, tmp_path: Path) -> None:
        config = configured(tmp_path, "", roles="")
        assert failure("list", "--config", config) == (
            "Error: the configuration names no keys file; set access.keys_file, or give --file\n"
        )

    def test_a_secret_is_changed_by_a_copy(self, tmp_path: Path) -> None:
        config = configured(tmp_path, f'[access]\nkeys_secret = "{SECRET_ARN}"\n')
        said = failure("new", "--name", "x", "--role", "writer", "--config", config)
        get, change, put_back = (line.strip() for line in said.splitlines()[1:])
        assert get == (
            f"aws secretsmanager get-secret-value --secret-id {SECRET_ARN} --query SecretString --output text > "
            "keys.jsonl"
        )
        assert change == f"mlflow-proxy keys new --config {config} --file keys.jsonl …"
        assert put_back == (
            f"aws secretsmanager put-secret-value --secret-id {SECRET_ARN} --secret-string file://keys.jsonl"
        )


class TestAudit:
    def test_every_change(self, config: Path, path: Path, audit: Path) -> None:
        made = run("new", "--name", "ci", "--role", "writer", "--expires", "30d", "--config", config).stdout
        rotated = run("rotate", "ci", "--expires", "never", "--config", config).stdout
        run("revoke", held(path)[0].id, "--config", config)
        run("revoke", held(path)[0].id, "--config", config)  # changes nothing
        assert run("new", "--name", "ci", "--role", "writer", "--config", config).exit_code == 1
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        first, second = held(path)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        common = {"name": "ci", "role": "writer", "by": user}
        until = (first.created + timedelta(days=30)).strftime("%Y-%m-%dT%H:%M:%SZ")
        expected: list[dict[str, Any]] = [
            {"event": "key-created", "key_id": first.id, "expires": until, **common},
            {"event": "key-rotated", "key_id": second.id, "expires": None, "replaces": [first.id], **common},
            {"event": "key-revoked", "key_id": first.id, "expires": until, **common},
        ]
        assert [{name: line[name] for name in wanted} for line, wanted in zip(lines, expected, strict=True)] == expected
        for text in (made, rotated):
            assert text.strip().rpartition("_")[2] not in audit.read_text()

    def test_what_cannot_be_recorded_is_not_done(self, config: Path, path: Path, audit: Path) -> None:
        new(path)
        before = path.read_bytes()
        text = config.read_text().replace(str(audit), "/dev/full")
        config.write_text(text)
        for command in (
            ("new", "--name", "x", "--role", "writer"),
            ("revoke", "ci-pipeline"),
            ("rotate", "ci-pipeline"),
        ):
            said = failure(*command, "--config", config)
            assert "the configuration has mistakes:\n  ✗ audit.to: /dev/full is not a regular file" in said
        assert path.read_bytes() == before

    @pytest.mark.parametrize("command", ["new", "rotate", "revoke"])
    def test_what_turns_out_not_to_be_recorded_is_said(
        self, config: Path, path: Path, audit: Path, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The change was made: a new key is shown all the same, or nobody would have it."""
        new(path)
        monkeypatch.setattr(audit_module, "_CLOSING", 0.2)
        audit.touch()
        arguments = ("new", "--name", "x", "--role", "writer") if command == "new" else (command, "ci-pipeline")
        with audit.open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)  # another process holds up all that write
            done = run(*arguments, "--config", config)
            assert audit.read_bytes() == b""
        assert done.exit_code == 1
        assert f"Error: the change was made, but not recorded: audit.to {audit}" in done.stderr
        if command == "revoke":
            assert "Revoked key" in done.stderr
            assert held(path)[0].revoked is not None
        else:
            assert identify(path, done.stdout.strip()) is not None


class TestProcesses:
    """The real command, in processes of its own."""

    def command(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        line = [*COMMAND, *(str(each) for each in arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, **more)

    def test_on_a_terminal(self, path: Path, tmp_path: Path) -> None:
        """The audit line would be of use to nobody there."""
        config = configured(tmp_path, f'[access]\nkeys_file = "{path}"\n')
        controller, terminal = pty.openpty()
        line = [*COMMAND, "new", "--name", "ci", "--role", "writer", "-c", str(config)]
        subprocess.run(line, stdin=terminal, stdout=terminal, stderr=terminal, check=True)
        os.close(terminal)
        said = os.read(controller, 65536).decode()
        os.close(controller)
        assert "key-created" not in said
        assert KEY.search(said)

    def test_in_a_script(self, path: Path, tmp_path: Path) -> None:
        config = configured(tmp_path, f'[access]\nkeys_file = "{path}"\n[audit]\nto = "stdout"\n')
        script = (
            f'KEY=$({" ".join(COMMAND)} new --name ci --role writer -c {config} 2>{tmp_path}/said) && echo "<$KEY>"'
        )
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
        assert KEY.fullmatch(done.stdout.strip().strip("<>"))
        assert done.stderr == ""
        said = (tmp_path / "said").read_text()
        assert '"event": "key-created"' in said  # never on standard output, wherever the service's audit log goes
        assert f"Made {path}" in said
        listed = self.command("list", "--json", "-c", config)
        assert [key["state"] for key in json.loads(listed.stdout)] == ["active"]
        failed = self.command("revoke", "nobody", "-c", config)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.startswith("Error: there is no key 'nobody'")

    def test_many_at_once(self, path: Path) -> None:
        """Twenty new keys, a rotation and a revocation, all started together: none is lost, and no line is torn."""
        new(path, "rotated")
        new(path, "revoked")
        commands = [["new", "--name", f"job-{number}", "--role", "writer"] for number in range(20)]
        commands += [["rotate", "rotated"], ["revoke", "revoked"]]
        started = [
            subprocess.Popen(
                [*COMMAND, *each, "--file", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for each in commands
        ]
        printed = []
        for process in started:
            out, said = process.communicate(timeout=240)
            assert process.returncode == 0, said
            printed.append(out.strip())
        found = held(path)
        assert len(found) == len(path.read_text().splitlines()) == 23
        assert {key.name for key in found} == {f"job-{number}" for number in range(20)} | {"rotated", "revoked"}
        assert len({key.id for key in found}) == 23
        hashes = {key.sha256 for key in found}
        assert all(sha256(text.encode()).hexdigest() in hashes for text in printed[:21])
        assert [key.revoked is not None for key in found[:2]] == [False, True]
        assert os.listdir(path.parent) == [path.name]

    def test_one_name_at_once(self, path: Path) -> None:
        """Of five that make the same name, one succeeds."""
        line = [*COMMAND, "new", "--name", "one", "--role", "writer", "--file", str(path)]
        started = [
            subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(5)
        ]
        printed = [process.communicate(timeout=240)[0] for process in started]
        assert sorted(process.returncode for process in started) == [0, 1, 1, 1, 1]
        assert sum(bool(out) for out in printed) == len(held(path)) == 1

    def test_it_waits_for_another(self, path: Path) -> None:
        new(path)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            process = subprocess.Popen([*COMMAND, "revoke", "ci-pipeline", "--file", path], stderr=subprocess.PIPE)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=3)
            assert held(path)[0].revoked is None
        assert process.stderr is not None
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert held(path)[0].revoked is not None

    def test_a_full_disk_costs_nothing(self, path: Path) -> None:
        for number in range(5):
            new(path, f"job-{number}")
        before = path.read_bytes()

        def no_room() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), len(before)))

        done = self.command("new", "--name", "x", "--role", "writer", "--file", path, preexec_fn=no_room)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{path} cannot be changed (File too large)" in done.stderr
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]


class TestFile:
    def test_nobody_else_reads_a_new_one(self, path: Path) -> None:
        umask = os.umask(0)
        try:
            new(path)
        finally:
            os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
    def test_the_mode_stays(self, path: Path, mode: int) -> None:
        new(path)
        path.chmod(mode)
        rotate(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        run("revoke", "ci-pipeline", "--file", path)
        assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
    def test_the_owner_stays(self, path: Path) -> None:
        new(path)
        os.chown(path, 12345, 23456)
        rotate(path)
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can act for another user")
    def test_who_may_not_write(self, path: Path) -> None:
        """Root makes the file in a folder of its own; another user gets the reason."""
        new(path)
        before = path.read_bytes()
        pid = os.fork()
        if pid == 0:  # a child with another user's rights, because pytest's folders are root's
            os.setgid(23456)
            os.setuid(12345)
            try:
                with key_file.change_keys(path):
                    pass
            except KeysError as error:
                os._exit(0 if "cannot be changed (Permission denied)" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert path.read_bytes() == before

    def test_a_link_stays_a_link(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        path.symlink_to(tmp_path / "real" / "keys.jsonl")
        new(path)
        rotate(path)
        assert path.is_symlink()
        assert len(held(tmp_path / "real" / "keys.jsonl")) == 2

    def test_readers_never_see_half_of_it(self, path: Path) -> None:
        new(path, "first")
        reader = path.open("rb")
        new(path, "second")
        assert len(parse_keys(reader.read())) == 1  # the old file, whole
        reader.close()

    def test_the_wait_for_a_lock_ends(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        new(path)
        monkeypatch.setattr(key_file, "_LOCK_DEADLINE", 0.2)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            started = time.monotonic()
            assert "is being changed by another command" in failure("revoke", "ci-pipeline", "--file", path)
            assert time.monotonic() - started >= 0.2
