"""`make cost`: it counts what the stacks have, prices are those of the file, and the page shows what is printed."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from click.testing import CliRunner, Result
from infra.commands import cost
from infra.commands.cost import HOURS, Amount, Line, Option, Prices
from infra.settings import Settings
from tests.infra.variants import ROOT, synthesize

PAGE = ROOT / "docs" / "cost.md"
OWN = Settings.model_validate(cost.settings_of(Option("", {}), {}))


def run(*arguments: str, context: str = "") -> Result:
    return CliRunner().invoke(cost.main, arguments, env={"CONTEXT": context})


@pytest.fixture(scope="module", autouse=True)
def each_synthesis_once() -> Iterator[None]:
    """It takes a second; several tests ask for the same."""
    made: dict[frozenset[tuple[str, str]], Any] = {}
    count = cost.count

    def remembered(context: Mapping[str, str]) -> Any:
        key = frozenset(context.items())
        if key not in made:
            made[key] = count(context)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "count", remembered)
        yield


@pytest.fixture(scope="module")
def printed() -> str:
    done = run()
    assert done.exit_code == 0, done.output
    return str(done.output)


def counted(**context: str) -> dict[str, float]:
    return {line.what: line.number for line in cost.lines(cost.count(cost.settings_of(Option("", context), {})))}


def test_what_is_counted_is_what_the_stacks_have() -> None:
    """Against templates that other tests synthesize their own way, and against the settings."""
    made = synthesize()
    found = counted()

    def number(stack: str, type_: str) -> int:
        return len(made.resources(stack, type_))

    assert found["NAT gateways"] == number("networking", "AWS::EC2::NatGateway") == OWN.nat_gateway_count
    assert found["public IPv4 addresses"] == number("networking", "AWS::EC2::EIP")
    # The only endpoint that is none of an interface is S3's.
    endpoints = number("networking", "AWS::EC2::VPCEndpoint") - 1
    assert found["interface endpoints, in each zone"] == endpoints * OWN.zones
    assert found["load balancer"] == number("flaskapp", "AWS::ElasticLoadBalancingV2::LoadBalancer") == 1
    assert found["hosts, t4g.small"] == OWN.instances_min
    assert found["alarms"] + found["alarms by anomaly"] == number("flaskapp", "AWS::CloudWatch::Alarm")
    assert found["alarms by anomaly"] == 2
    assert found["metrics from the log"] == number("flaskapp", "AWS::Logs::MetricFilter")
    assert found["rules in it"] == len(made.one("flaskapp", "AWS::WAFv2::WebACL")["Rules"])
    keys = sum(number(stack, "AWS::KMS::Key") for stack in made.templates)
    assert found["KMS keys"] == keys
    assert found["tracking server, Small"] == 1
    assert "MLflow App" not in found


def test_options_change_what_is_counted() -> None:
    closed = counted(nat_gateways="0", waf="false", zones="3", mlflow_size="Large", instances_max="3")
    assert not {"NAT gateways", "public IPv4 addresses", "web ACL", "rules in it"} & closed.keys()
    more = counted()["interface endpoints, in each zone"] / OWN.zones + 1
    assert closed["interface endpoints, in each zone"] == more * 3, "one endpoint more, for CloudFormation"
    assert closed["tracking server, Large"] == 1
    tasks = counted(compute="fargate", mlflow_type="serverless", instances_max="1", instances_min="1")
    assert tasks["MLflow App"] == 1
    assert (tasks["tasks: vCPUs"], tasks["tasks: GB of memory"]) == (0.5, 1)
    assert not any(what.startswith("hosts") for what in tasks)
    assert "Valkey, the least" not in tasks
    public = counted(internet_facing="true", allowed_cidrs="0.0.0.0/0")
    assert public["public IPv4 addresses"] == 1 + OWN.zones, "that of the NAT gateway, and the load balancer's"


def test_sums() -> None:
    prices = Prices.read()
    assert cost.amount([Line("a", 2, "nat-gateway", 2 * HOURS)], prices) == Amount(2 * HOURS * 0.045)
    assert cost.amount([Line("a", 1, "kms-key", 1), Line("b", 1, "m9g-large", HOURS)], prices) == Amount(1, ("b",))
    assert str(Amount(1, ("b",))) == "1.00 + unknown"
    valkey = cost.lines({"AWS::ElastiCache::ServerlessCache": [{}]})
    assert round(cost.amount(valkey, prices).usd, 2) == 6.13, "the least, as others have it"


def test_prices_are_complete() -> None:
    data = tomllib.loads(cost.PRICES.read_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", data.pop("date"))
    assert data.pop("region") == "us-east-1"
    for name, price in data.items():
        wanted = {"unit", "page"} | ({"usd", "found"} if "usd" in price else set())
        assert price.keys() == wanted, name
        assert price.get("usd", 1) > 0
    used = set()
    for option in (*cost.DEFAULTS, *cost.LEVERS, Option("", {"architecture": "x86_64"})):
        used |= {line.price for line in cost.lines(cost.count(cost.settings_of(option, {})))}
    used |= {"tracking-server-large", "fargate-cpu-x86_64", "fargate-memory-x86_64"}
    assert used == data.keys(), "each price is used, and each thing has one, if only an unknown one"


def test_settings_in_context_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LEVERS", (Option("nat_gateways=0", {"nat_gateways": "0"}),))
    data = json.loads(run("--json", context="waf=false zones=3").output)
    assert [option["name"] for option in data["options"]] == [
        "tracking, dev",
        "serverless, dev",
        "tracking, prod",
        "nat_gateways=0",
    ]
    numbers = {line["what"]: line["number"] for line in data["options"][0]["lines"]}
    assert "web ACL" not in numbers
    assert numbers["interface endpoints, in each zone"] == counted()["interface endpoints, in each zone"] / 2 * 3


def test_json() -> None:
    data = json.loads(run("--json").output)
    assert data["prices"] == {"region": "us-east-1", "date": Prices.read().date}
    options: Mapping[str, Any] = {option["name"]: option for option in data["options"]}
    assert options.keys() == {option.name for option in (*cost.DEFAULTS, *cost.LEVERS)}
    first = options["tracking, dev"]
    assert first["monthly"] == pytest.approx(sum(line["monthly"] for line in first["lines"]), abs=0.1)
    assert first["unknown"] == []
    assert options["serverless, dev"]["unknown"] == ["MLflow App"]
    assert [line["monthly"] for line in options["serverless, dev"]["lines"] if line["what"] == "MLflow App"] == [None]


def test_mistakes_in_context_are_told() -> None:
    done = run(context="nat_gateways=7")
    assert done.exit_code == 2
    assert "nat_gateways: " in done.output
    done = run(context="waf")
    assert done.exit_code == 2
    assert "CONTEXT: 'waf' is no setting" in done.output


def test_page_shows_what_is_printed(printed: str) -> None:
    """If not: `.venv/bin/python -m infra.commands.cost`, and put what it prints into the page."""
    shown = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert printed in shown


def test_page_names_the_sums_of_the_table(printed: str) -> None:
    """Sums in the page's own sentences."""
    text = re.sub(r"```text\n.*?```", "", PAGE.read_text(), flags=re.DOTALL)
    named = re.findall(r"\$([0-9]+)", text)
    assert named
    sums = {round(float(one)) for one in re.findall(r"[0-9]+\.[0-9]{2}", printed)}
    assert {int(one) for one in named} <= sums


def test_an_option_that_does_not_go_with_the_others() -> None:
    given = {"mlflow_type": "serverless"}
    assert cost._try(Option("", {"nat_gateways": "0"}), given) is None
    assert cost._lever(Option("x", {}), None, Amount(1), Prices.read()) == ("x", "-", "not with these settings")
