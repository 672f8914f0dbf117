"""What a changed setting replaces, by AWS's own schemas: the table in docs/deploy-aws.md, and nothing besides."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER  # type: ignore[import-untyped]
from tests.infra.test_deploy_page import rows, section
from tests.infra.variants import CLIENT_CERTIFICATES, IMAGE, PROD, REGION, SIGN_IN, TLS, Synthesized, synthesize

PUBLIC = {"internet_facing": "true", "allowed_cidrs": "192.0.2.0/24"}
Settings = dict[str, str]
# What is hosts or tasks themselves may be another at each deployment.
OF_COMPUTE = ("AutoScaling", "ECS", "ApplicationAutoScaling", "IAM", "Lambda", "Logs", "EC2")


def _fixed(type_: str) -> list[list[str]]:
    """The properties of a type that AWS does not change in place, as paths."""
    if not type_.startswith("AWS::") or type_ == "AWS::CDK::Metadata":
        return []
    schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema(REGION, type_).schema
    return [path.removeprefix("/properties/").split("/") for path in schema.get("createOnlyProperties", [])]


def _at(value: Any, path: list[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def replaced(before: Synthesized, after: Synthesized) -> set[str]:
    """Types of which a resource is replaced: in its place, or by one with another logical id."""
    found = set()
    for stack, template in before.templates.items():
        old, new = template["Resources"], after.templates[stack]["Resources"]
        for name in old.keys() & new.keys():
            properties = [one[name].get("Properties", {}) for one in (old, new)]
            if any(_at(properties[0], path) != _at(properties[1], path) for path in _fixed(old[name]["Type"])):
                found.add(old[name]["Type"])
        gone = {old[name]["Type"] for name in old.keys() - new.keys()}
        come = {new[name]["Type"] for name in new.keys() - old.keys()}
        found |= {type_ for type_ in gone & come if type_.split("::")[1] not in OF_COMPUTE}
    return {type_.split("::")[-1] for type_ in found}


CHANGES: dict[str, list[tuple[Settings, Settings]]] = {
    "zone_names": [({}, {"zone_names": f"{REGION}b,{REGION}c"})],
    "zones": [({}, {"zones": "3"})],
    "mlflow_name": [({}, {"mlflow_name": "other"}), ({"mlflow_type": "serverless"}, {"mlflow_name": "other"})],
    "internet_facing": [(PUBLIC, {"internet_facing": "false"})],
    "compute": [({}, {"compute": "fargate", "image": IMAGE})],
    "studio_domain": [({}, {"studio_domain": "other"})],
    "studio_user": [({}, {"studio_user": "other"})],
}
IN_PLACE: dict[str, tuple[Settings, Settings]] = {
    "size": ({}, {"mlflow_size": "Large", "mlflow_version": "3.0", "maintenance_window": "Sun:03:30"}),
    "registration": ({}, {"model_registration": "true"}),
    "architecture": ({}, {"architecture": "x86_64"}),
    "numbers": ({}, {"instances_min": "3", "instances_max": "9", "drain_seconds": "90", "waf_rate": "100"}),
    "gateways": ({}, {"nat_gateways": "per-zone"}),
    "closed": ({}, {"nat_gateways": "0"}),
    "endpoints": ({}, {"endpoints": "none"}),
    "callers": ({}, {"allowed_cidrs": "10.0.0.0/8"}),
    "name": ({}, TLS["given"]),
    "requested": ({}, TLS["requested"]),
    "sign-in": (TLS["given"], SIGN_IN),
    "client certificates": (TLS["given"], CLIENT_CERTIFICATES),
    "prod": (TLS["given"], PROD),
    "firewall": ({}, {"waf": "false"}),
}


def table() -> dict[str, set[str]]:
    """What the page says is replaced, by setting."""
    found: dict[str, set[str]] = {}
    for settings, types, meaning in rows(section("Updates")):
        assert meaning
        for setting in re.findall(r"`(\w+)`", settings):
            found[setting] = set(re.findall(r"`(\w+)`", types))
    return found


@pytest.mark.parametrize("setting", CHANGES)
def test_page_says_what_a_changed_setting_replaces(setting: str) -> None:
    found = set()
    for before, change in CHANGES[setting]:
        found |= replaced(synthesize(**before), synthesize(**{**before, **change}))
    if setting == "studio_domain":
        # The user is in the domain, whose id is another then.
        found.add("UserProfile")
    assert found == table()[setting]


def test_another_network_cannot_take_the_place_of_the_first() -> None:
    """The page has it in the row of what cannot be changed, with the one that AWS names first."""
    assert replaced(synthesize(), synthesize(vpc_cidr="10.9.0.0/16")) == {"Subnet", "VPC"}
    assert table()["vpc_cidr"] == table()["vpc_id"] == {"Subnet"}
    assert set(table()) == {*CHANGES, "vpc_cidr", "vpc_id"}


@pytest.mark.parametrize("change", IN_PLACE)
def test_other_settings_change_in_place(change: str) -> None:
    before, after = IN_PLACE[change]
    assert replaced(synthesize(**before), synthesize(**{**before, **after})) == set()


def test_fewer_zones_are_refused_because_what_goes_is_in_use() -> None:
    def exports(zones: str) -> set[str]:
        made = synthesize(zones=zones).templates["networking"]["Outputs"].values()
        return {one["Export"]["Name"] for one in made if "Export" in one}

    assert exports("2") < exports("3")
