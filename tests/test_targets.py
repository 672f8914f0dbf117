"""ARNs and endpoints."""

from __future__ import annotations

import pytest
from botocore.loaders import Loader
from hypothesis import given
from hypothesis import strategies as st

from mlflow_proxy.access.actions import routes
from mlflow_proxy.targets import (
    TAKEN,
    TARGET_NAME,
    Endpoint,
    Mode,
    TargetError,
    default_endpoint,
    parse_arn,
    parse_endpoint,
    parse_public_url,
)

TRACKING = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/team-a"


@pytest.mark.parametrize(
    ("arn", "mode", "host", "service", "header"),
    [
        (
            TRACKING,
            Mode.TRACKING,
            "eu-west-1.experiments.sagemaker.aws",
            "sagemaker-mlflow",
            "x-mlflow-sm-tracking-server-arn",
        ),
        (
            "arn:aws:sagemaker:us-east-2:000000000001:mlflow-app/app-AB12cd",
            Mode.APP,
            "mlflow.sagemaker.us-east-2.app.aws",
            "sagemaker",
            "x-sm-mlflow-app-arn",
        ),
        (
            "arn:aws-us-gov:sagemaker:us-gov-west-1:123456789012:mlflow-app/x",
            Mode.APP,
            "mlflow.sagemaker.us-gov-west-1.app.aws",
            "sagemaker",
            "x-sm-mlflow-app-arn",
        ),
        (
            "arn:aws-us-gov:sagemaker:us-gov-east-1:123456789012:mlflow-tracking-server/x",
            Mode.TRACKING,
            "us-gov-east-1.experiments.sagemaker.aws",
            "sagemaker-mlflow",
            "x-mlflow-sm-tracking-server-arn",
        ),
    ],
)
def test_arn(arn: str, mode: Mode, host: str, service: str, header: str) -> None:
    parsed = parse_arn(arn)
    assert parsed.text == arn
    assert parsed.mode is mode
    assert (parsed.mode.service, parsed.mode.arn_header) == (service, header)
    assert (
        f"arn:{parsed.partition}:sagemaker:{parsed.region}:{parsed.account}:{mode.resource_type}/{parsed.resource}"
        == arn
    )
    assert default_endpoint(parsed) == Endpoint("https", host, 443)


@pytest.mark.parametrize(
    ("arn", "words"),
    [
        ("", "not an ARN"),
        ("team-a", "not an ARN"),
        ("https://example.com", "not an ARN"),
        ("arn:aws:sagemaker:eu-west-1:123456789012", "not an ARN"),
        (TRACKING.replace("arn:", "ARN:"), "not an ARN"),
        (" " + TRACKING, "not an ARN"),
        (TRACKING.replace(":aws:", ":aws-cn:"), "partition 'aws-cn'"),
        (TRACKING.replace(":aws:", ":aws-iso:"), "partition 'aws-iso'"),
        (TRACKING.replace(":aws:", "::"), "partition ''"),
        (TRACKING.replace("sagemaker", "s3"), "service 's3'"),
        (TRACKING.replace("eu-west-1", ""), "region ''"),
        (TRACKING.replace("eu-west-1", "EU-WEST-1"), "region 'EU-WEST-1'"),
        (TRACKING.replace("eu-west-1", "eu-west-1.evil.example/"), "region"),
        (TRACKING.replace("eu-west-1", "eu-west-\u0661"), "region"),
        (TRACKING.replace("eu-west-1", "us-gov-west-1"), "not in partition 'aws'"),
        (TRACKING.replace(":aws:", ":aws-us-gov:"), "not in partition 'aws-us-gov'"),
        (TRACKING.replace("123456789012", "12345678901"), "12 digits"),
        (TRACKING.replace("123456789012", "1234-5678-90"), "12 digits"),
        (TRACKING.replace("123456789012", "\u0661" * 12), "12 digits"),
        (TRACKING.replace("mlflow-tracking-server", "notebook-instance"), "resource"),
        (TRACKING.replace("/team-a", ""), "resource"),
        (TRACKING.replace("team-a", ""), "resource"),
        (TRACKING.replace("team-a", "-a"), "resource"),
        (TRACKING.replace("team-a", "a b"), "resource"),
        (TRACKING.replace("team-a", "a/b"), "resource"),
        (TRACKING.replace("team-a", "tëam"), "resource"),
        (TRACKING + "\n", "resource"),
        (TRACKING + "\r\nx: y", "resource"),
        (TRACKING + ":1", "resource"),
    ],
)
def test_unusable_arn_says_why(arn: str, words: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_arn(arn)
    assert words in str(caught.value)


@given(text=st.text(max_size=200))
def test_any_text_is_an_arn_or_a_target_error(text: str) -> None:
    with pytest.raises(TargetError):
        parse_arn(text)


@given(
    arn=st.from_regex(
        r"arn:aws:sagemaker:[a-z]{2}-[a-z]+-\d:\d{12}:mlflow-(app|tracking-server)/\w{1,40}", fullmatch=True
    )
)
def test_an_accepted_arn_can_be_a_header_value(arn: str) -> None:
    try:
        parsed = parse_arn(arn)
    except TargetError:
        return
    assert parsed.text.encode("ascii").isascii()
    assert default_endpoint(parsed).host.isascii()


def test_resource_types_are_those_of_the_service_model() -> None:
    """botocore's model of SageMaker has both kinds of ARN."""
    shapes = Loader().load_service_model("sagemaker", "service-2")["shapes"]
    pattern = str(shapes["TrackingServerArn"]["pattern"])
    assert f":{Mode.TRACKING.resource_type}/" in pattern


@pytest.mark.parametrize(
    ("url", "endpoint", "authority"),
    [
        ("https://vpce-1.example.com", Endpoint("https", "vpce-1.example.com", 443), "vpce-1.example.com"),
        ("https://vpce-1.example.com/", Endpoint("https", "vpce-1.example.com", 443), "vpce-1.example.com"),
        ("https://h:443", Endpoint("https", "h", 443), "h"),
        ("http://h:443", Endpoint("http", "h", 443), "h:443"),
        ("http://h", Endpoint("http", "h", 80), "h"),
        ("http://h:", Endpoint("http", "h", 80), "h"),
        ("HTTP://H:80", Endpoint("http", "h", 80), "h"),
        ("http://127.0.0.1:9500", Endpoint("http", "127.0.0.1", 9500), "127.0.0.1:9500"),
        ("http://[::1]:9500", Endpoint("http", "::1", 9500), "[::1]:9500"),
        ("https://[FD00::1]", Endpoint("https", "fd00::1", 443), "[fd00::1]"),
        ("http://my_host-1.local:8080", Endpoint("http", "my_host-1.local", 8080), "my_host-1.local:8080"),
    ],
)
def test_endpoint(url: str, endpoint: Endpoint, authority: str) -> None:
    parsed = parse_endpoint(url)
    assert parsed == endpoint
    assert parsed.authority == authority
    assert parsed.url == f"{endpoint.scheme}://{authority}"
    assert parse_endpoint(parsed.url) == parsed


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "h",
            "h:443",
            "//h",
            "ftp://h",
            "unix:///x",
            "javascript:alert(1)",
            "http://",
            "https://:443",
            "http:///x",
        ),
        *(
            "https://h/path",
            "https://h//",
            "https://h?x=1",
            "https://h#x",
            "https://user@h",
            "https://user:pw@h",
            "https://@h",
        ),
        *(
            "https://h:99999",
            "https://h:-1",
            "https://h:x",
            "https://[::1",
            "https://::1",
            "https://h h",
            "https://h%20",
        ),
        *("https://hä", "https://h,i", "https://h\\x", "https://[::1%25eth0]", "https://h:1:2", "https://*"),
    ],
)
def test_unusable_endpoint(url: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_endpoint(url)
    assert str(caught.value)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        *((name, True) for name in ("a", "dev", "Dev-1_x", "0", "a" * 63)),
        *((name, False) for name in ("", "-", "-a", "a-", "_a", "a b", "a.b", "a/b", "ä", "a\n", "a" * 64, "..", "a%")),
    ],
)
def test_target_name(name: str, good: bool) -> None:
    assert bool(TARGET_NAME.fullmatch(name)) == good


@pytest.mark.parametrize(
    ("text", "prefix", "url"),
    [
        ("https://h", "", "https://h"),
        ("https://h/", "", "https://h"),
        ("HTTPS://H:8443/mlflow", "/mlflow", "https://h:8443/mlflow"),
        ("https://h/ml.flow_1~/a-b/", "/ml.flow_1~/a-b", "https://h/ml.flow_1~/a-b"),
        ("https://h/mlflow/t", "/mlflow/t", "https://h/mlflow/t"),
        ("http://[::1]:8080/x", "/x", "http://[::1]:8080/x"),
    ],
)
def test_public_url(text: str, prefix: str, url: str) -> None:
    parsed = parse_public_url(text)
    assert (parsed.prefix, parsed.url) == (prefix, url)


@pytest.mark.parametrize(
    "path",
    ["/a?b", "/a#b", "//a", "/a//b", "/..", "/./a", "/a/..", "/a b", "/a%20b", "/ä", "/a\\b", "/a;b", '/a"', "/a\nb"],
)
def test_a_public_url_has_a_plain_path(path: str) -> None:
    with pytest.raises(TargetError, match="plain path"):
        parse_public_url(f"https://h{path}")


@pytest.mark.parametrize("path", ["/t", "/-/", "/t/app", "/api", "/ajax-api/2.0", "/static-files", "/graphql"])
def test_a_prefix_is_nothing_that_has_a_meaning(path: str) -> None:
    with pytest.raises(TargetError, match="choose another"):
        parse_public_url(f"https://h{path}")


def test_what_has_a_meaning_is_known() -> None:
    assert {path.split("/")[1] for _, path, _ in routes()} - {""} | {"t", "-"} == TAKEN
