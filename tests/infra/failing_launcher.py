"""moto's server whose CloudFormation fails when it is told to, as the real one does. For tests only, as moto_launcher.

The file that MOTO_FAILS names holds a stack's name: its next deployment fails, and is rolled back.
"""

from __future__ import annotations

import os
from pathlib import Path

from moto.cloudformation.models import CloudFormationBackend, Event
from tests.infra import moto_launcher

REASON = "The maximum number of addresses has been reached."


def fail_when_told() -> None:
    """Executing a change set of that stack ends as a failed creation ends: events, and nothing made."""
    execute = CloudFormationBackend.execute_change_set

    def execute_or_fail(self: CloudFormationBackend, change_set_name: str, stack_name: str | None = None) -> None:
        stack = self.describe_change_set(change_set_name).stack
        order = Path(os.environ["MOTO_FAILS"])
        if not order.is_file() or order.read_text() != stack.name:
            execute(self, change_set_name, stack_name)
            return
        order.unlink()
        stack._add_stack_event("CREATE_IN_PROGRESS", resource_status_reason="User Initiated")
        for name, reason in (("Address", REASON), ("Other", "Resource creation cancelled")):
            stack.events.append(
                Event(stack.stack_id, stack.name, name, "", "AWS::EC2::EIP", "CREATE_FAILED", reason, None)
            )
        stack._add_stack_event("ROLLBACK_IN_PROGRESS", resource_status_reason="The following resource(s) failed")
        stack._add_stack_event("ROLLBACK_COMPLETE")
        stack.status = "ROLLBACK_COMPLETE"

    CloudFormationBackend.execute_change_set = execute_or_fail


def main() -> None:
    repair = moto_launcher.repair

    def repair_and_fail() -> None:
        repair()
        fail_when_told()

    moto_launcher.repair = repair_and_fail
    moto_launcher.main()
