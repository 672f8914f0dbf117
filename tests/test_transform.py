"""The canonical path and query: one meaning, or a refusal."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

import pytest
from botocore.utils import normalize_url_path
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlflow_proxy.errors import Refusal
from mlflow_proxy.transform import canonical_path, canonical_query

# Escapes only of what needs one, in upper case; RFC 3986 pchar without escapes of unreserved characters.
ESCAPE = r"%(?!4[1-9A-F]|5[0-9A]|6[1-9A-F]|7[0-9AE]|3[0-9]|2[DE]|5F)[0-9A-F]{2}"
PATH_GRAMMAR = re.compile(rf"/|(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|{ESCAPE})+)+/?")
TEXT_GRAMMAR = rf"(?:[A-Za-z0-9._~-]|{ESCAPE})*"
QUERY_GRAMMAR = re.compile(rf"(?:{TEXT_GRAMMAR}={TEXT_GRAMMAR}(?:&{TEXT_GRAMMAR}={TEXT_GRAMMAR})*)?")
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"


def whatwg_path(path: str) -> str:
    """What the WHATWG URL standard's parser makes of the path of an http URL."""
    path = re.sub(r"[\t\n\r]", "", path).replace("\\", "/")
    out: list[str] = []
    parts = path.split("/")[1:]
    for index, part in enumerate(parts):
        plain = re.sub("%2e", ".", part, flags=re.IGNORECASE)
        last = index == len(parts) - 1
        if plain == "..":
            out = out[:-1]
        if plain in (".", ".."):
            out += [""] if last else []
            continue
        out.append("".join(f"%{b:02X}" if b < 0x21 or b > 0x7E or b in b'"#<>?^`{}' else chr(b) for b in part.encode()))
    return "/" + "/".join(out)


def whatwg_query(query: str) -> str:
    """The same for its query."""
    query = re.sub(r"[\t\n\r]", "", query)
    return "".join(f"%{b:02X}" if b < 0x21 or b > 0x7E or b in b"\"#<>'" else chr(b) for b in query.encode())


def check_path(raw: bytes, path: str) -> None:
    """What holds for every path that comes out."""
    assert PATH_GRAMMAR.fullmatch(path), path
    assert canonical_path(path.encode()) == path
    assert normalize_url_path(path) == path
    assert whatwg_path(path) == path
    assert urlsplit(f"http://host{path}?").path == path
    decoded = unquote_to_bytes(path)
    assert not {b".", b".."} & set(decoded.split(b"/"))
    assert not re.search(rb"[\x00-\x1f\x7f\\]", decoded)
    assert decoded.decode("utf-8").encode() == decoded
    assert re.sub(b"/+", b"/", decoded) == re.sub(b"/+", b"/", unquote_to_bytes(raw))


def check_query(raw: bytes, query: str) -> None:
    """What holds for every query that comes out."""
    assert QUERY_GRAMMAR.fullmatch(query), query
    assert canonical_query(query.encode()) == query
    assert whatwg_query(query) == query
    assert urlsplit(f"http://host/?{query}").query == query
    meant = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict")
    assert parse_qsl(query, keep_blank_values=True, errors="strict") == meant


def canonical_or_none(function: Callable[[bytes], str], raw: bytes) -> str | None:
    """What `function` makes of `raw`; None if that is a proper refusal."""
    try:
        return function(raw)
    except Refusal as refusal:
        if refusal.status != 400 or not refusal.message:
            raise
        return None


path_pieces = st.sampled_from(
    [
        *(
            "/",
            "a",
            "Zz9",
            "-._~",
            "!$&'()*+,;=:@",
            "api/2.0/mlflow",
            ".",
            "..",
            "...",
            ".a",
            "%2e",
            "%2E",
            "%2F",
            "%2f",
        ),
        *(
            "%5C",
            "%41",
            "%7e",
            "%20",
            "%25",
            "%252e",
            "%252F",
            "%00",
            "%0a",
            "%7F",
            "%zz",
            "%",
            "%4",
            "%C3%A9",
            "%c3%a9",
        ),
        *(
            "%E6%BC%A2",
            "%F0%9F%9A%80",
            "%C0%AF",
            "%FF",
            "\\",
            " ",
            "|",
            "^",
            "{",
            "}",
            "[",
            "]",
            '"',
            "<",
            ">",
            "`",
            "#",
        ),
        *("\t", "\n", "\x00", "\x7f", "é", "漢", ARTIFACTS, "/t/dev", "/gateway/proxy/x/"),
    ]
).map(str.encode)
raw_paths = st.lists(path_pieces, max_size=10).map(b"".join).map(lambda raw: b"/" + raw) | st.binary(max_size=20)
query_pieces = st.sampled_from(
    [
        *(
            "a",
            "b1",
            "=",
            "==",
            "&",
            "&&",
            "+",
            "%20",
            "%2B",
            "%26",
            "%3D",
            "%25",
            "%2e",
            "%41",
            "%c3%A9",
            "%00",
            "%FF",
        ),
        *(
            "%F0%9F%9A%80",
            "%0A",
            "'",
            '"',
            "<",
            "/",
            "?",
            "\\",
            "#",
            ";",
            ":",
            "|",
            "~",
            ".",
            "*",
            "(",
            ")",
            "%",
            "%g1",
        ),
        *(" ", "\t", "\x00", "é", "filter=name%3D'a'", "max_results=5", "[]", "{}", "`", "^", "!", "$", "@", ","),
    ]
).map(str.encode)
raw_queries = st.lists(query_pieces, max_size=10).map(b"".join) | st.binary(max_size=20)


@settings(max_examples=1500, deadline=None)
@given(raw=raw_paths)
@example(raw=b"/")
@example(raw=b"/t/dev/")
@example(raw=b"/%7Euser/%2d/a%2bb")
def test_any_path_is_canonical_or_refused(raw: bytes) -> None:
    path = canonical_or_none(canonical_path, raw)
    if path is not None:
        check_path(raw, path)


@settings(max_examples=1500, deadline=None)
@given(raw=raw_queries)
@example(raw=b"a&&b")
@example(raw=b"=&=1&a")
def test_any_query_is_canonical_or_refused(raw: bytes) -> None:
    query = canonical_or_none(canonical_query, raw)
    if query is not None:
        check_query(raw, query)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["C"], exclude_characters="/\\"), min_size=1), max_size=6)
)
def test_every_name_can_be_in_a_path(texts: list[str]) -> None:
    """Whatever a client escapes, arrives: names in all scripts, emoji, percent signs."""
    texts = [text for text in texts if text not in (".", "..")]
    raw = "/" + "/".join("".join(f"%{byte:02x}" for byte in text.encode()) for text in texts)
    path = canonical_path(raw.encode())
    check_path(raw.encode(), path)
    assert [unquote_to_bytes(part).decode() for part in path.split("/")[1:] if part] == texts


@settings(max_examples=300, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))] * 2), max_size=6
    )
)
def test_every_text_can_be_in_a_query(pairs: list[tuple[str, str]]) -> None:
    def escaped(text: str) -> str:
        return "".join("+" if char == " " else "".join(f"%{byte:02x}" for byte in char.encode()) for char in text)

    raw = "&".join(f"{escaped(name)}={escaped(value)}" for name, value in pairs).encode()
    query = canonical_query(raw)
    check_query(raw, query)
    assert parse_qsl(query, keep_blank_values=True) == pairs


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("/", "/"),
        ("//", "/"),
        ("///a", "/a"),
        ("/a//b///", "/a/b/"),
        ("/a/", "/a/"),
        ("/api/2.0/mlflow/runs/get", "/api/2.0/mlflow/runs/get"),
        ("/%61%70%69", "/api"),
        ("/%7e%2D%2e%5f", "/~-._"),
        ("/a%2eb", "/a.b"),
        ("/a%3ab", "/a%3Ab"),
        ("/a:b@c", "/a:b@c"),
        ("/a%20b", "/a%20b"),
        ("/a%c3%a9", "/a%C3%A9"),
        ("/a|b", "/a%7Cb"),
        ("/a\"b'c", "/a%22b'c"),
        ("/a<b>^`{}[]", "/a%3Cb%3E%5E%60%7B%7D%5B%5D"),
        ("/a+b", "/a+b"),
        ("/...", "/..."),
        ("/.a/..b/c..", "/.a/..b/c.."),
        ("/%252e%252e/x", "/%252e%252e/x"),
        ("/%252F", "/%252F"),
        ("/%255c", "/%255c"),
        ("/%F0%9F%9A%80", "/%F0%9F%9A%80"),
        ("/t/dev/", "/t/dev/"),
        ("/t/dev//api", "/t/dev/api"),
        ("//evil.example/x", "/evil.example/x"),
        (ARTIFACTS + "a%2fb", ARTIFACTS + "a%2Fb"),
        ("/t/dev" + ARTIFACTS + "a%2Fb", "/t/dev" + ARTIFACTS + "a%2Fb"),
    ],
)
def test_path(raw: str, path: str) -> None:
    assert canonical_path(raw.encode()) == path


@pytest.mark.parametrize(
    "raw",
    [
        "/a#b",
        *("", "a", "*", "http://host/", "host:443", "?a=1", " /a"),
        *("/.", "/..", "/./a", "/../a", "/a/.", "/a/..", "/a/./b", "/a/../b", "/t/dev/../prod/", "/t/./"),
        *("/%2e", "/%2E%2E/a", "/.%2e/a", "/%2e./a", "/a/%2e%2E", "//..//a", "/t/dev/%2e%2e/prod/"),
        *(ARTIFACTS + "..%2Fa", ARTIFACTS + "a%2F..%2Fb", ARTIFACTS + "a%2f%2e%2e", ARTIFACTS + "%2E%2f"),
        *("/a\\b", "/a%5Cb", "/a%5cb", "/..\\a", "/%2e%2e%5c"),
        *("/a%00", "/a%0a", "/a%0D%0Ahost:x", "/a%1f", "/a%7f", "/a\x00", "/a\tb", "/a\nb", "/a\rb", "/a b", "/a\x7f"),
        *("/%", "/%4", "/%zz", "/%4g", "/a%", "/%%41", "/%u0041", "/% 41"),
        *("/é", "/漢", "/🚀"),
        *("/%ff", "/%C0%AF", "/%C0%AE%C0%AE/", "/%ED%A0%80", "/%F8%80%80%80", "/%c3", "/%c3/%a9"),
        *("/a%2Fb", "/api%2F2.0/x", "/t%2Fdev/", "/t/dev%2Fapi", "/%2F", "/static-files/a%2Fb", "/build/a%2fb"),
        *("/api/2.0/mlflow-artifacts/artifacts%2Fx", "/x/api/2.0/mlflow-artifacts/artifacts/a%2Fb"),
        *("/api/2.0/mlflow-artifacts/other/a%2Fb", "/t/a%2Fb" + ARTIFACTS + "c", "/t/a/t/b" + ARTIFACTS + "c%2Fd"),
        *("/api/2.0/mlflow/experiments%2Fget", "/gateway/proxy/a%2Fb/c", "/-/ui%2Fdev", "/graphql%2F"),
    ],
)
def test_refused_path(raw: str) -> None:
    with pytest.raises(Refusal) as caught:
        canonical_path(raw.encode())
    assert caught.value.status == 400
    assert caught.value.message.endswith(".")


@pytest.mark.parametrize("byte", [*range(0x21), 0x7F, *range(0x80, 0x100)])
def test_raw_byte_that_a_url_may_not_contain(byte: int) -> None:
    for function, raw in ((canonical_path, b"/a%cb" % byte), (canonical_query, b"a=%cb" % byte)):
        with pytest.raises(Refusal) as caught:
            function(raw)
        assert caught.value.status == 400


@pytest.mark.parametrize(
    ("raw", "query"),
    [
        ("", ""),
        ("a=1", "a=1"),
        ("a", "a="),
        ("a=", "a="),
        ("=", "="),
        ("=v", "=v"),
        ("a&&b", "a=&b="),
        ("&a=1&", "a=1"),
        ("&", ""),
        ("a=b=c", "a=b%3Dc"),
        ("a=1+2", "a=1%202"),
        ("a=1%2B2", "a=1%2B2"),
        ("a+b=c", "a%20b=c"),
        ("a=%7e%41", "a=~A"),
        ("a=%c3%a9", "a=%C3%A9"),
        ("b=2&a=1&b=1&a=1", "b=2&a=1&b=1&a=1"),
        ("name='a b'".replace(" ", "%20"), "name=%27a%20b%27"),
        ("filter=name='a+b'", "filter=name%3D%27a%20b%27"),
        ('filter=metrics."x">1', "filter=metrics.%22x%22%3E1"),
        ("a=%F0%9F%9A%80", "a=%F0%9F%9A%80"),
        ("a=x/y?z:@", "a=x%2Fy%3Fz%3A%40"),
        ("a=../..\\x", "a=..%2F..%5Cx"),
        ("a=1;b=2", "a=1%3Bb%3D2"),
        ("a[]=1", "a%5B%5D=1"),
        ("a=%0A%09", "a=%0A%09"),
        ("a=%2500", "a=%2500"),
        ("path=a%2Fb", "path=a%2Fb"),
    ],
)
def test_query(raw: str, query: str) -> None:
    assert canonical_query(raw.encode()) == query


@pytest.mark.parametrize(
    "raw",
    [
        "a=#b",
        *("a=%", "a=%4", "a=%zz", "%=1", "a=%%41", "a=100%&b=1", "%u0041=1"),
        *("a=%00", "%00", "a=%ff", "a=%C0%80", "a=%ED%A0%80", "a=%c3&b=%a9"),
        *("a=1 2", "a=é", "a=\t", "a=1\r\nx", "a=\x00", "a=\x7f"),
    ],
)
def test_refused_query(raw: str) -> None:
    with pytest.raises(Refusal) as caught:
        canonical_query(raw.encode())
    assert caught.value.status == 400


# Encoded slashes, against the installed MLflow


def flask_rules() -> Iterator[str]:
    from mlflow.server import app

    yield from (rule.rule for rule in app.url_map.iter_rules())


def fastapi_rules() -> Iterator[str]:
    from mlflow.server.fastapi_app import create_fastapi_app

    def walk(routes: Any, prefix: str) -> Iterator[str]:
        for route in routes:
            if hasattr(route, "original_router"):
                yield from walk(route.original_router.routes, prefix + route.include_context.prefix)
            elif getattr(route, "path", None):
                yield prefix + route.path

    yield from walk(create_fastapi_app().routes, "")


@pytest.fixture(scope="module")
def rules() -> list[str]:
    """Every route of the installed MLflow, in Flask's notation."""
    converted = [re.sub(r"\{(\w+):path\}", r"<path:\1>", rule) for rule in fastapi_rules()]
    converted = [re.sub(r"\{(\w+)\}", r"<\1>", rule) for rule in converted]
    found = [*flask_rules(), *converted]
    assert len(found) > 300
    return found


def filled(rule: str, chosen: int, slash: str) -> str:
    """A path of `rule` whose parameter number `chosen` contains an encoded slash."""
    counter = iter(range(99))
    return re.sub(r"<[^>]+>", lambda _: f"a{slash}b" if next(counter) == chosen else "a", rule)


def takes_encoded_slash(path: str) -> bool:
    try:
        return canonical_path(path.encode()) == path.replace("%2f", "%2F")
    except Refusal:
        return False


def test_encoded_slashes_pass_exactly_where_mlflow_has_path_parameters(rules: list[str]) -> None:
    wrong, passed, refused = [], 0, 0
    files = ("/build/<path:filename>", "/static-files/<path:path>", "/<path:path>")
    for rule in rules:
        parameters = re.findall(r"<[^>]+>", rule)
        below_mcp = "/mlflow/mcp-servers/" in rule  # its names hold slashes, and stand before other parameters
        for index, parameter in enumerate(parameters):
            expected = (parameter.startswith("<path:") and rule not in files) or below_mcp
            for slash in ("%2F", "%2f"):
                for prefix in ("", "/t/dev"):
                    path = prefix + filled(rule, index, slash)
                    passed, refused = passed + expected, refused + (not expected)
                    if takes_encoded_slash(path) != expected:
                        wrong.append(path)
    assert wrong == []
    assert passed > 100
    assert refused > 100


def test_every_rule_without_parameters_is_canonical_as_it_is(rules: list[str]) -> None:
    plain = [rule for rule in rules if "<" not in rule]
    assert len(plain) > 200
    assert [rule for rule in plain if canonical_path(rule.encode()) != rule] == []
    assert [
        rule for rule in plain if takes_encoded_slash(rule.rstrip("/") + "%2Fx") and "mcp-servers" not in rule
    ] == []


def test_names_as_mlflows_client_escapes_them() -> None:
    from mlflow.store.tracking.mcp_server_registry import rest_mixin

    path = rest_mixin._MCP_API_PREFIX + rest_mixin._server_path("io.github.someone/weather & more")
    assert "%2F" in path
    assert canonical_path(path.encode()) == path


def test_no_file_of_the_ui_needs_an_escape() -> None:
    """So /static-files/ and /build/ stay without encoded slashes."""
    import mlflow.server

    build = Path(mlflow.server.__file__).parent / "js" / "build"
    names = [str(path.relative_to(build)) for path in build.rglob("*") if path.is_file()]
    manifest = json.loads((build / "asset-manifest.json").read_text())
    assert len(names) > 20
    urls = [f"/static-files/{name}" for name in names] + list(manifest["files"].values())
    urls = [url if url.startswith("/") else f"/{url}" for url in urls]
    assert [url for url in urls if canonical_path(url.encode()) != url] == []


# No input takes longer than its length explains


def seconds_for(function: Callable[[bytes], str], raw: bytes) -> float:
    best = 60.0
    for _ in range(3):
        started = time.process_time()
        canonical_or_none(function, raw)
        best = min(best, time.process_time() - started)
    return best


HARD_PATHS = [
    *("/", "/a", "/.", "/.a", "/..a", "/%41", "/%2e", "%", "a", "/%C3%A9", "/|", "/t/", "%2F", "/a%20"),
]
HARD_QUERIES = ["a", "a=", "a=1&", "&", "=", "%41", "+", "a=+&", "a=%C3%A9&", "%", "a=1&b", "'"]
ENDINGS = ["", "\\", "%", "!", "%2F"]


@pytest.mark.parametrize("unit", HARD_PATHS)
def test_path_takes_linear_time(unit: str) -> None:
    for start in ("/", "/t/", "/gateway/proxy/", ARTIFACTS):
        for ending in ENDINGS:
            check_linear(canonical_path, start.encode(), unit.encode(), ending.encode())


@pytest.mark.parametrize("unit", HARD_QUERIES)
def test_query_takes_linear_time(unit: str) -> None:
    for ending in ENDINGS:
        check_linear(canonical_query, b"", unit.encode(), ending.encode())


def check_linear(function: Callable[[bytes], str], start: bytes, unit: bytes, ending: bytes) -> None:
    """Eight times the input may take 30 times as long (64 if quadratic), noise and all."""
    short, long = 8 * 1024, 64 * 1024
    small = seconds_for(function, start + unit * (short // len(unit)) + ending)
    large = seconds_for(function, start + unit * (long // len(unit)) + ending)
    assert large < 30 * small + 0.01
