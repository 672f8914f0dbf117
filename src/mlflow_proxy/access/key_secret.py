"""API keys from AWS Secrets Manager: one secret holds the text of a keys file. Only the fetching; it blocks.

When it is fetched, and what its keys then are, is decided in `keys`.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from mlflow_proxy.access.key_record import KeysError
from mlflow_proxy.aws import codes, sessions
from mlflow_proxy.settings import Aws

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager import SecretsManagerClient

# Seconds for one look, the credentials for it included. Whatever hangs beyond has a deadline of its own in `sessions`.
_DEADLINE = 30.0


class SecretMissing(Exception):
    """AWS says that there is no such secret (any more), or nothing in it. The message says what to do."""


def fetch_secret(arn: str, aws: Aws, *, proxy: str | None) -> bytes:
    """The secret's current text, in at most 30 seconds.

    Credentials come from the default chain, anew each time. Raises SecretMissing, or KeysError with the reason.
    """
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(_fetch(arn, aws, proxy))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name="keys-secret-fetch", daemon=True).start()
    # `from None`: an error's own text may hold a secret, and a traceback in a log would show it.
    try:
        return result.result(_DEADLINE)
    except TimeoutError:
        raise KeysError(f"AWS did not answer within {_DEADLINE:.0f} s; check routes and VPC endpoints") from None
    except ClientError as error:
        raise _explained(error, aws) from None
    except (KeysError, SecretMissing):
        raise
    except Exception as error:
        raise KeysError(sessions.explain(error, aws)) from None


def _fetch(arn: str, aws: Aws, proxy: str | None) -> bytes:
    region = arn.split(":")[3]
    credentials = sessions.from_chain(aws, region=region, proxy=proxy)
    client: SecretsManagerClient = sessions.new_session(aws, proxy).create_client(
        "secretsmanager",
        region_name=region,
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
        aws_session_token=credentials.token,
    )
    try:
        answer = client.get_secret_value(SecretId=arn)
    finally:
        client.close()
    if "SecretString" not in answer:
        raise KeysError("the secret is binary; store the keys as text, with --secret-string file://keys.jsonl")
    return answer["SecretString"].encode("utf-8")


def _explained(error: ClientError, aws: Aws) -> KeysError | SecretMissing:
    code = sessions.error_code(error)
    if code == "ResourceNotFoundException":
        return SecretMissing("there is no such secret, or no value in it; compare the ARN with the console")
    if code == "InvalidRequestException":
        return SecretMissing("the secret is marked for deletion; `aws secretsmanager restore-secret` brings it back")
    if code in codes.DENIED:
        said = str(error.response.get("Error", {}).get("Message", "")).rstrip(".")
        return KeysError(
            f"AWS denied it: {said}. Allow secretsmanager:GetSecretValue on the secret, and kms:Decrypt on its key if "
            "that is a key of your own"
        )
    if code == "DecryptionFailure":
        return KeysError("AWS cannot decrypt the secret; check that its KMS key is enabled, and kms:Decrypt on it")
    return KeysError(sessions.explain(error, aws))
