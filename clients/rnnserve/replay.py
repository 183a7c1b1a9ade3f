"""What a stream keeps of its messages, to send them again where the server has lost or never had them."""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from rnnserve.texts import TextUnit, text_of, text_steps
from rnnserve.v1.real_time_service_pb2 import Steps
from rnnserve.v1.tensor_pb2 import Tensor

WhenReplayFull = Literal["wait", "drop"]
"""What to do with a full buffer: wait for the server's next checkpoint, or drop the oldest answered messages."""

REPLAY_BUFFER_BYTES = 16 * 1024 * 1024


def check_replay(limit_bytes: int, when_full: WhenReplayFull) -> None:
    """Raises ValueError."""
    if when_full not in ("wait", "drop"):
        raise ValueError(f'when_replay_full must be "wait" or "drop", not {when_full!r}')
    if limit_bytes < 0:
        raise ValueError(f"replay_buffer_bytes must be 0 or more, not {limit_bytes}")


@dataclass(eq=False)
class Message:
    """Steps, or a reset, which has none."""

    first: int
    """The index of the first step; of a reset: of the step that follows."""
    end: int
    """The index behind the last step; of a reset: the same as `first`."""
    steps: Steps | None
    unit: TextUnit | None = None
    """Of a text; None for numbers, and for a reset."""
    answered: bool = False

    @property
    def size_bytes(self) -> int:
        """What it counts in the buffer."""
        return self.steps.ByteSize() if self.steps is not None else 0

    def part(self, first: int, end: int) -> Steps:
        """Only the steps from `first` to before `end`."""
        if self.steps is None:
            raise ValueError("a reset has no steps")
        if self.steps.HasField("text"):
            steps = text_steps(self.steps.text, self.unit)
            return Steps(first_step=first, text=text_of(steps[first - self.first : end - self.first]))
        tensor = self.steps.tensor
        row_bytes = len(tensor.data) // tensor.shape[0]
        data = tensor.data[(first - self.first) * row_bytes : (end - self.first) * row_bytes]
        shape = [end - first, *tensor.shape[1:]]
        return Steps(first_step=first, tensor=Tensor(data_type=tensor.data_type, shape=shape, data=data))


class Replay:
    """The messages that the server may still ask for, in order.

    Those are the ones without an answer and, where the server survives a crash, those behind its last checkpoint.
    """

    def __init__(self, limit_bytes: int = REPLAY_BUFFER_BYTES, when_full: WhenReplayFull = "wait") -> None:
        check_replay(limit_bytes, when_full)
        self.complete = True  # nothing was ever dropped: a session can be built from its beginning
        self._limit_bytes = limit_bytes
        self._drops = when_full == "drop"
        self._messages: deque[Message] = deque()
        self._size_bytes = 0

    @property
    def full(self) -> bool:
        """Whether nothing more should be sent for now."""
        return self._size_bytes > self._limit_bytes

    def add(self, message: Message) -> None:
        """The newest message."""
        last = self._messages[-1] if self._messages else None
        if last is not None and last.answered and last.steps is None and message.steps is None:
            self._messages.pop()  # two resets in a row are one
        self._messages.append(message)
        self._size_bytes += message.size_bytes

    def prune(self, durable_step: int | None) -> None:
        """Drops what was answered and is durable. None = durability does not count."""
        while self._messages and self._messages[0].answered and _is_durable(self._messages[0], durable_step):
            self._remove(0)
        if self._drops:
            self._drop_oldest()

    def drop_from(self, message: Message, index: int) -> None:
        """Drops the steps of this message from `index` on, and all messages behind it."""
        while self._messages and (last := self._messages.pop()):
            self._size_bytes -= last.size_bytes
            if last is message:
                break
        if message.steps is not None and index > message.first:
            message.steps, message.end = message.part(message.first, index), index
            self.add(message)

    def since(self, index: int, next_step: int) -> list[Message] | None:
        """What must be sent again to a session that expects the step `index`; None = it is no longer here."""
        again = [message for message in self._messages if _is_behind(message, index)]
        firsts = [message.first for message in again if message.steps is not None]
        if index < next_step and (not firsts or firsts[0] > index):
            return None
        return again

    def _drop_oldest(self) -> None:
        """Of the answered steps; a reset costs nothing and stays."""
        place = 0
        while self.full and place < len(self._messages) and self._messages[place].answered:
            if self._messages[place].steps is None:
                place += 1
            else:
                self._remove(place)

    def _remove(self, place: int) -> None:
        self._size_bytes -= self._messages[place].size_bytes
        del self._messages[place]
        self.complete = False


def _is_durable(message: Message, durable_step: int | None) -> bool:
    """A reset is known to be durable once a step behind it is."""
    if durable_step is None:
        return True
    return message.first < durable_step if message.steps is None else message.end <= durable_step


def _is_behind(message: Message, index: int) -> bool:
    """A reset at the index itself may be done or not; doing it twice changes nothing."""
    return message.first >= index if message.steps is None else message.end > index
