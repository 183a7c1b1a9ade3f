"""The tasks by name. A name may differ from its bundle's in nothing: they are the same."""

from __future__ import annotations

from models.tasks import chorale, diacritics, pronunciation, sentiment, speaker
from models.tasks.activity import ACTIVITY
from models.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        speaker.FRAME,
        chorale.CHORALE,
        chorale.VANILLA,
        speaker.SPEAKER,
        speaker.DEEP,
        speaker.BIDIRECTIONAL,
        ACTIVITY,
        sentiment.SENTIMENT,
        sentiment.BIDIRECTIONAL,
        diacritics.DIACRITICS,
        diacritics.LIVE,
        diacritics.FORWARD,
        pronunciation.PRONUNCIATION,
    )
}
