"""Builds the messages of a multiplexed call."""

from collections.abc import Iterator

import numpy as np

from rnnserve.batches import Batch
from rnnserve.session_table import SessionTable
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

_ROW_BYTES = 30  # at most: a handle, two indices of steps, and how long a text is
_MESSAGE_BYTES = 100  # at most, besides its rows


class BatchRequests:
    """Batches -> messages that the server takes: not too large, and of one version of the model each."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._versions: set[int] = set()
        self._max_rows = 1
        self._max_message_bytes = 0

    def note(self, opened: pb.SessionOpened) -> None:
        """What the server takes."""
        self._versions.add(opened.version)
        self._max_rows = opened.max_steps_per_message
        self._max_message_bytes = opened.max_message_bytes

    def of(self, batch: Batch) -> Iterator[pb.MultiplexStepsRequest]:
        """Of sessions that are open."""
        if batch.kind == "steps":
            return map(self._steps, self._parts(batch))
        table, numbers = self._table, batch.numbers
        handles, answered_steps = table.handle[numbers].tolist(), table.handed_step[numbers]
        if batch.kind == "reset":
            return map(_reset, handles, batch.first_steps.tolist(), answered_steps.tolist())
        # A caller who has all that has come wants none of what a look-ahead keeps.
        has_all = (table.look_ahead[numbers] > 0) & (answered_steps >= table.answered_step[numbers])
        answered_steps = np.where(has_all, batch.first_steps, answered_steps)
        return map(_close, handles, batch.first_steps.tolist(), answered_steps.tolist())

    def _parts(self, batch: Batch) -> list[Batch]:
        if not len(batch):
            return []
        alike = [batch]
        if len(self._versions) > 1:
            versions = self._table.version[batch.numbers]
            alike = [batch.rows(versions == version) for version in np.unique(versions)]
        row_bytes = batch.row_bytes + _ROW_BYTES
        rows = max(1, min(self._max_rows, (self._max_message_bytes - _MESSAGE_BYTES) // row_bytes))
        return [part.rows(slice(i, i + rows)) for part in alike for i in range(0, len(part), rows)]

    def _steps(self, batch: Batch) -> pb.MultiplexStepsRequest:
        request, table, inputs = pb.MultiplexStepsRequest(), self._table, batch.inputs
        steps = request.steps
        steps.handles.extend(table.handle[batch.numbers].tolist())
        steps.first_steps.extend(batch.first_steps.tolist())
        steps.answered_steps.extend(table.handed_step[batch.numbers].tolist())
        if batch.has_texts:
            steps.text.steps.extend(inputs)
        else:
            data = inputs.astype("<f4", copy=False).tobytes()
            steps.tensor.CopyFrom(Tensor(data_type=DATA_TYPE_FLOAT32, shape=inputs.shape, data=data))
        return request


def _reset(handle: int, first_step: int, answered_step: int) -> pb.MultiplexStepsRequest:
    reset = pb.ResetHandle(handle=handle, reset=pb.ResetSession(first_step=first_step), answered_step=answered_step)
    return pb.MultiplexStepsRequest(reset=reset)


def _close(handle: int, first_step: int, answered_step: int) -> pb.MultiplexStepsRequest:
    close = pb.CloseHandle(handle=handle, close=pb.CloseSession(first_step=first_step), answered_step=answered_step)
    return pb.MultiplexStepsRequest(close=close)
