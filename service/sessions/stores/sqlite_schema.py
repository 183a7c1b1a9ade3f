"""What the SQLite file looks like, and how it came to."""

from __future__ import annotations

# The script at index n makes schema version n + 1 of version n. Those that were released never change.
MIGRATIONS = [
    """
    CREATE TABLE sessions (
        tenant TEXT NOT NULL,
        session_id TEXT NOT NULL,
        model_name TEXT NOT NULL,
        model_version INTEGER NOT NULL,
        next_step INTEGER NOT NULL,
        opened_s REAL NOT NULL,
        used_s REAL NOT NULL,
        size_bytes INTEGER NOT NULL,
        record BLOB NOT NULL,
        UNIQUE (tenant, session_id)
    );
    -- All that a summary needs, so that opening reads no record.
    CREATE INDEX summaries ON sessions
        (used_s, tenant, session_id, model_name, model_version, next_step, opened_s, size_bytes);
    """,
    """
    ALTER TABLE sessions ADD COLUMN fence INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE sessions ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    -- Processes that use the file now; `expires_s` is of the monotonic clock of that boot.
    CREATE TABLE owners (
        owner TEXT PRIMARY KEY, boot_id TEXT NOT NULL, expires_s REAL NOT NULL, port INTEGER NOT NULL,
        secret BLOB NOT NULL
    );
    -- Kept by the triggers, for to count takes a walk through all sessions.
    CREATE TABLE totals (tenant TEXT PRIMARY KEY, sessions INTEGER NOT NULL, size_bytes INTEGER NOT NULL);
    CREATE TABLE parked (
        model_name TEXT NOT NULL, model_version INTEGER NOT NULL, sessions INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL, PRIMARY KEY (model_name, model_version)
    );
    INSERT INTO totals SELECT tenant, count(*), sum(size_bytes) FROM sessions GROUP BY tenant;
    INSERT INTO parked
        SELECT model_name, model_version, count(*), sum(size_bytes) FROM sessions GROUP BY model_name, model_version;
    CREATE TRIGGER session_added AFTER INSERT ON sessions BEGIN
        INSERT INTO totals VALUES (new.tenant, 1, new.size_bytes)
            ON CONFLICT DO UPDATE SET sessions = sessions + 1, size_bytes = size_bytes + excluded.size_bytes;
    END;
    CREATE TRIGGER session_erased AFTER DELETE ON sessions BEGIN
        UPDATE totals SET sessions = sessions - 1, size_bytes = size_bytes - old.size_bytes WHERE tenant = old.tenant;
    END;
    CREATE TRIGGER session_resized AFTER UPDATE OF size_bytes ON sessions WHEN old.size_bytes <> new.size_bytes BEGIN
        UPDATE totals SET size_bytes = size_bytes + new.size_bytes - old.size_bytes WHERE tenant = new.tenant;
    END;
    CREATE TRIGGER parked_added AFTER INSERT ON sessions WHEN new.owner = '' BEGIN
        INSERT INTO parked VALUES (new.model_name, new.model_version, 1, new.size_bytes)
            ON CONFLICT DO UPDATE SET sessions = sessions + 1, size_bytes = size_bytes + excluded.size_bytes;
    END;
    CREATE TRIGGER parked_erased AFTER DELETE ON sessions WHEN old.owner = '' BEGIN
        UPDATE parked SET sessions = sessions - 1, size_bytes = size_bytes - old.size_bytes
        WHERE (model_name, model_version) = (old.model_name, old.model_version);
    END;
    CREATE TRIGGER parked_changed AFTER UPDATE OF owner, size_bytes ON sessions
    WHEN '' IN (old.owner, new.owner) AND (old.owner, old.size_bytes) <> (new.owner, new.size_bytes) BEGIN
        UPDATE parked SET
            sessions = sessions - (old.owner = ''), size_bytes = size_bytes - (old.owner = '') * old.size_bytes
        WHERE (model_name, model_version) = (old.model_name, old.model_version);
        INSERT INTO parked
            VALUES (new.model_name, new.model_version, new.owner = '', (new.owner = '') * new.size_bytes)
            ON CONFLICT DO UPDATE SET
                sessions = sessions + excluded.sessions, size_bytes = size_bytes + excluded.size_bytes;
    END;
    """,
]

COLUMNS = "tenant, session_id, model_name, model_version, next_step, opened_s, used_s, size_bytes"
KEY = "tenant = ? AND session_id = ?"
UPDATE = """
    model_name = excluded.model_name, model_version = excluded.model_version, next_step = excluded.next_step,
    opened_s = excluded.opened_s, used_s = excluded.used_s, size_bytes = excluded.size_bytes, record = excluded.record
"""
