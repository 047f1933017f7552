"""Event files of TensorBoard, opened for each write and closed again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

EVENT_FILE: Final = "events.out.tfevents.0.aqn_tune"


def write_events(path: Path, summaries: Sequence[tuple[int, Any]], *, anew: bool) -> None:
    """Append summaries to an event file, each with its step; `anew` begins the file."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    if anew:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb" if anew else "ab") as file:
        records = RecordWriter(file)
        if anew:
            version = event_pb2.Event(wall_time=now, file_version="brain.Event:2")
            records.write(version.SerializeToString())
        for step, summary in summaries:
            event = event_pb2.Event(wall_time=now, step=step, summary=summary)
            records.write(event.SerializeToString())
