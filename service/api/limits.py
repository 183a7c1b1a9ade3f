"""The limits that the API enforces; they are settings of the service."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import MessageTooLarge


@dataclass(frozen=True)
class Limits:
    """Units are in the names."""

    max_message_bytes: int
    max_steps_per_message: int
    max_outstanding_steps: int
    max_sequence_steps: int
    max_recording_steps: int
    part_timeout_s: float  # 0 = none
    max_queued_sequences: int
    max_bulk_sequences: int
    idle_timeout_s: float  # 0 = none

    def check_size(self, size_bytes: int) -> None:
        """Of a message. Raises MessageTooLarge."""
        if size_bytes > self.max_message_bytes:
            raise MessageTooLarge(
                f"the message has {size_bytes} bytes, more than {self.max_message_bytes}",
                field="request",
                limit=self.max_message_bytes,
            )
