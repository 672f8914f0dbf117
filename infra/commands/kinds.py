"""The kinds of things that AWS keeps when stacks are gone: what each costs, in words, and when one is ours."""

from __future__ import annotations

from dataclasses import dataclass

# What says that something is ours.
RECORD = "CloudFormation's record"
TAGS = "tags"
NAME = "name"
DESCRIPTION = "description"
OWN_TAG = "tag of our certificate function"


@dataclass(frozen=True)
class Kind:
    """One kind of thing that stays. `word` is what a person types; `final` says what cannot be had back."""

    word: str
    title: str
    cost: str
    final: str = ""


# In the order of deletion: a key after all that it encrypts, a group after the interfaces that hold it.
KINDS = (
    Kind(
        "mlflow",
        "MLflow tracking servers and Apps",
        "for a tracking server a price per hour while it runs, and storage; for an App see AWS's price page",
        "all experiments, runs and registered models, for good",
    ),
    Kind(
        "buckets",
        "S3 buckets with artifacts and access logs",
        "storage of every version, per GB and month; an empty bucket costs nothing",
        "all objects in all versions, for good",
    ),
    Kind(
        "log-groups",
        "CloudWatch log groups",
        "storage, per GB and month, until the group's retention ends; without a retention, for ever",
        "all log lines, for good",
    ),
    Kind(
        "log-streams",
        "log streams of the SageMaker domain in the group that all domains share",
        "storage, per GB and month; the group has no retention unless you set one",
        "all log lines of the domain, for good",
    ),
    Kind("certificates", "self-signed certificates in ACM", "nothing"),
    Kind(
        "secrets",
        "secrets with API keys (hashes)",
        "a price per secret and month, until it is marked for deletion",
        "in seven days; until then it can be restored",
    ),
    Kind(
        "home-folders",
        "EFS file systems with the home folders of Studio",
        "storage, per GB and month",
        "all files of all users, for good",
    ),
    Kind("roles", "IAM roles of MLflow", "nothing"),
    Kind("network-interfaces", "network interfaces that nothing uses", "nothing, but they keep groups and a VPC"),
    Kind("security-groups", "security groups", "nothing, but they keep a VPC from being deleted"),
    Kind("addresses", "elastic IP addresses", "a price per hour, whether it is used or not"),
    Kind(
        "keys",
        "KMS keys",
        "a price per key and month, until its deletion is scheduled",
        "in 30 days, and with the key all that it encrypts; until then it can be cancelled",
    ),
    Kind("keys-in-deletion", "KMS keys in deletion", "nothing while they wait"),
    Kind("secrets-in-deletion", "secrets in deletion", "nothing while they wait"),
)
# They go by themselves at their date.
WAITING = ("keys-in-deletion", "secrets-in-deletion")


@dataclass(frozen=True)
class Retained:
    """One thing that is there though its stack is not. `id` is what the service's API takes."""

    kind: str
    id: str
    stack: str
    signs: frozenset[str] = frozenset()
    detail: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it may be deleted."""
        return RECORD in self.signs or len(self.signs) > 1
