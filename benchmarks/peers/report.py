"""What `make bench-peers` says of its rows."""

from __future__ import annotations

from benchmarks.turns import Row, client, ratio

OURS = "rnnserve"
AHEAD = 2  # steps of each multiplexed session
HEAD = ["server", "streams", "steps/s", "rnnserve ÷ it", "p50 ms", "p99 ms", "rnnserve's p99 ÷ its", "CPU µs/step"]
HEAD += ["client"]


def lines_of(rows: list[Row]) -> list[list[str]]:
    """Of the table."""
    ours = {row.streams: row for row in rows if row.server == OURS and not row.ahead}
    lines = []
    for row in rows:
        compared = None if row.ahead else ours.get(row.streams)
        lines.append([
            row.label, f"{row.streams:,}", row.text("steps_per_s"),
            f"{ratio(compared, row):.2f}" if compared else "",
            f"{row.median('p50_ms'):.2f}", f"{row.median('p99_ms'):.2f}",
            f"{ratio(compared, row, 'p99_ms'):.2f}" if compared else "",
            f"{row.median('server_cpu_us_per_step'):.0f}", client(row),
        ])  # fmt: skip
    return lines


def best_peers(rows: list[Row]) -> list[str]:
    """A line for each number of streams: the fastest of the others, and what rnnserve does beside it."""
    ours = {(row.streams, row.ahead): row for row in rows if row.server == OURS}
    lines = []
    for streams in dict.fromkeys(row.streams for row in rows):
        peers = [row for row in rows if row.streams == streams and row.server != OURS]
        if not peers or (streams, 0) not in ours:
            continue
        best = max(peers, key=lambda row: row.median("steps_per_s"))
        quickest = min(peers, key=lambda row: row.median("p99_ms"))
        line = (
            f"{streams:,} {'stream' if streams == 1 else 'streams'}: "
            f"{ratio(ours[streams, 0], best):.2f} × the steps/s of the best ({best.server}), "
            f"{ratio(ours[streams, 0], quickest, 'p99_ms'):.2f} × the least p99 ({quickest.server})"
        )
        if (streams, AHEAD) in ours:
            line += f"; multiplexed {ratio(ours[streams, AHEAD], best):.1f} × the steps/s"
        lines.append(line)
    return lines
