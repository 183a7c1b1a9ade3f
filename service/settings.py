"""All settings of the service: by variable (RNNSERVE_PORT), flag (--port) or a TOML file (port = …).

A flag wins over a variable, a variable over the file, the file over the default.

Secrets may stand in files instead, which only the service can read: `redis_url_file` and `snapshot_key_file` name them.
"""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

PREFIX = "RNNSERVE_"
FILE_VARIABLE = "RNNSERVE_SETTINGS_FILE"
OTHER_VARIABLES = ("RNNSERVE_TARGET", "RNNSERVE_TOKEN", "RNNSERVE_CACHE")  # of the client, and of training


class SettingsError(ValueError):
    """The settings cannot be used; the message names the setting and its bound."""


def _split(names: object) -> object:
    """`speaker,activity` of a flag or a variable; a file has a list."""
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else names


ModelNames = Annotated[frozenset[str], NoDecode, BeforeValidator(_split)]
VALUES = {
    "str": "TEXT", "SecretStr": "URL", "Path": "PATH", "{Path,null}": "PATH", "bool": "{true,false}",
    "frozenset[str]": "NAME,NAME",
}  # fmt: skip
"""What `--help` calls them."""


class Settings(BaseSettings):
    """Limits are per service. A setting is a flag, a variable, or in the file that RNNSERVE_SETTINGS_FILE names:

    --bfloat16-models speaker,activity
    RNNSERVE_BFLOAT16_MODELS=speaker,activity
    bfloat16_models = ["speaker", "activity"]
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, cli_kebab_case=True, cli_prog_name="python -m service"
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 = all")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 = any free one")
    metrics_port: int = Field(9464, ge=0, le=65535, description="port of /metrics; 0 = any free one")
    workers: int = Field(1, ge=1, le=64, description="processes that serve streams; 1 = all in one process")
    worker_timeout_s: float = Field(
        10.0, ge=1.0, le=600.0, description="a worker that answers nothing for so long is killed and started again"
    )
    model_repository: Path = Field(Path("models/repository"), description="folder of <name>/<version>/ bundles")
    bfloat16_models: ModelNames = Field(
        frozenset(),
        max_length=1_000,
        description="models with bfloat16 weights; of each must have been "
        "measured by `python -m models evaluate MODEL --bfloat16` what that loses",
    )
    max_bfloat16_loss_points: float = Field(
        0.5, ge=0.0, le=10.0, description="percentage points of right predictions that bfloat16 may lose, else no start"
    )
    state_dir: Path = Field(
        Path(".state"),
        description="folder of one server's own: sessions.sqlite, and server.json with its ports while it serves",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json = an object a line; auto = text on a terminal, else json"
    )
    trace_sample_ratio: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="share of the steps and of the calls other than streams that have a span of OpenTelemetry, if the "
        "caller does not decide; spans go to where OTEL_EXPORTER_OTLP_ENDPOINT says; 0 = no spans at all",
    )

    max_message_bytes: int = Field(
        4 * 2**20,
        ge=2**10,
        le=64 * 2**20,
        description="bytes of one message; a larger one is MESSAGE_TOO_LARGE, and one of 1 MiB more is refused by gRPC "
        "itself, without a reason",
    )
    max_steps_per_message: int = Field(1_024, ge=1, le=100_000, description="steps in one message of a stream")
    max_outstanding_steps: int = Field(
        32, ge=1, le=1_000, description="unanswered steps of a multiplexed session; one more is QUEUE_FULL"
    )
    max_streams: int = Field(
        10_000, ge=1, le=1_000_000, description="live streams and multiplexed sessions; one more is SESSION_LIMIT"
    )
    max_generations: int = Field(
        64,
        ge=1,
        le=10_000,
        description="outputs that are written at once; one more is QUEUE_FULL",
    )
    max_tick_sessions: int = Field(256, ge=1, le=4_096, description="sessions that share one forward")
    device: str = Field(
        "cpu",
        min_length=1,
        max_length=64,
        description="torch's name of where live steps are computed, such as cuda:0; others than cpu are untested",
    )
    step_threads: int = Field(1, ge=1, le=64, description="torch threads of a tick")

    session_store: Literal["sqlite", "memory", "redis"] = Field(
        "sqlite",
        description="where sessions are kept; those in memory survive the end of a stream, not of the server; those in "
        "Redis can go on at any service that uses it",
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), description="redis://[:password@]host:port/database, rediss:// for TLS"
    )
    redis_url_file: Path | None = Field(
        None,
        description="file whose only line is redis_url, instead of it: a secret in a variable or a flag is seen by "
        "whoever may look at the container or the process",
    )
    redis_prefix: str = Field("rnnserve:", description="how all names begin that are used in Redis")
    power_loss_safe: bool = Field(
        False, description="whether a checkpoint survives a loss of power, not only the death of a process; slower"
    )
    checkpoint_interval_s: float = Field(
        1.0, ge=0.01, le=3_600.0, description="between two checkpoints of the sessions that have changed"
    )
    checkpoint_steps: int = Field(
        100_000, ge=0, le=100_000_000, description="steps of all sessions that bring the next one forward; 0 = none do"
    )
    store_timeout_s: float = Field(
        5.0, ge=0.05, le=600.0, description="after which the store counts as unavailable until it has answered"
    )
    max_held_bytes: int = Field(
        2**20,
        ge=0,
        le=2**30,
        description="unacknowledged answers of a session; past it the oldest are dropped, and to resume from before "
        "them is RESUME_POINT_LOST",
    )
    session_lease_s: float = Field(
        5.0,
        ge=0.5,
        le=60.0,
        description="a process that is silent for so long loses its sessions to others that use the store, if they ask",
    )
    resume_window_s: float = Field(
        3_600.0, ge=0.0, le=31_536_000.0, description="how long a parked session is kept; 0 = ends with its stream"
    )
    idle_timeout_s: float = Field(
        3_600.0,
        ge=0.0,
        le=31_536_000.0,
        description="a stream without a message for so long is parked, and a "
        "generation ended whose client reads nothing for so long; 0 = never",
    )
    max_session_age_s: float = Field(
        0.0, ge=0.0, le=315_360_000.0, description="after which a session ends, live or parked; 0 = never"
    )
    max_sessions: int = Field(
        200_000,
        ge=1,
        le=10_000_000,
        description="live and parked; for one more the longest parked is evicted, and if none is, it is SESSION_LIMIT",
    )
    max_sessions_per_tenant: int = Field(
        0, ge=0, le=10_000_000, description="the same for each tenant; 0 = as many as there may be in all"
    )
    max_parked_bytes: int = Field(
        8 * 2**30,
        ge=0,
        le=2**50,
        description="states and answers of parked sessions; past it the longest parked go; 0 = no limit",
    )

    snapshot_key_file: Path | None = Field(
        None,
        description="file of lines <key id>:<64 hex digits>; the first key signs exported sessions, all verify "
        "imported ones; without it neither is possible",
    )
    snapshot_lifetime_s: float = Field(
        86_400.0, ge=0.0, le=315_360_000.0, description="how long an exported session can be imported; 0 = for ever"
    )

    max_sequence_steps: int = Field(20_000, ge=1, le=1_000_000, description="steps of one whole sequence")
    max_queued_sequences: int = Field(256, ge=1, le=100_000, description="waiting; one more is QUEUE_FULL")
    max_bulk_sequences: int = Field(64, ge=1, le=10_000, description="in flight on one bulk stream, then it waits")
    max_batch_sequences: int = Field(64, ge=1, le=1_024, description="whole sequences that share a tick")
    max_batch_steps: int = Field(
        131_072, ge=1, le=10_000_000, description="of all whole sequences under way; a longer one is computed alone"
    )
    max_recording_steps: int = Field(
        2_000_000,
        ge=1,
        le=2**31 - 1,
        description="steps of a sequence that comes in parts; each has as many as a whole one",
    )
    max_recordings: int = Field(
        4, ge=1, le=1_000, description="sequences that come in parts, in all; one more waits, or is QUEUE_FULL"
    )
    part_timeout_s: float = Field(
        300.0,
        ge=0.0,
        le=86_400.0,
        description="a client that for so long does not send the next part of such a sequence, or does not read what "
        "it is sent about it, loses it with PART_OVERDUE; 0 = never",
    )
    spill_dir: Path | None = Field(
        None,
        description="folder on a disk for what is computed of these: each takes 8 bytes a step, unit and direction; "
        "without it the system's folder for temporary files, which is memory where that is a tmpfs",
    )
    sequence_threads: int = Field(1, ge=1, le=64, description="torch threads of the lane for whole sequences")
    sequence_niceness: int = Field(10, ge=0, le=19, description="how far that lane stands back; 0 = not at all")

    drain_timeout_s: float = Field(
        10.0,
        ge=0.0,
        le=3_600.0,
        description="from SIGTERM to the end of the process: live streams go on for most of it, if they must",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get(FILE_VARIABLE)
        sources = (init_settings, env_settings)
        return (*sources, TomlConfigSettingsSource(settings_cls, _existing(file))) if file else sources


def _existing(file: str) -> Path:
    if not Path(file).is_file():  # pydantic-settings would pass over it in silence
        raise SettingsError(f"{FILE_VARIABLE}: {file} is not a file")
    return Path(file)


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Raises SettingsError with one sentence for each wrong setting. `--help` prints all and exits."""
    flags = sys.argv[1:] if arguments is None else arguments
    problems = _unknown_variables()
    try:
        settings = Settings(_cli_settings_source=_flags(flags))
    except ValidationError as error:
        raise SettingsError("; ".join([*problems, *map(_sentence, error.errors())])) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{FILE_VARIABLE}: {os.environ.get(FILE_VARIABLE)} cannot be read: {error}") from None
    if problems:
        raise SettingsError("; ".join(problems))
    return _with_secrets(settings)


def _with_secrets(settings: Settings) -> Settings:
    """Those that stand in files. Raises SettingsError, which never says what stands there."""
    file = settings.redis_url_file
    if file is None:
        return settings
    if "redis_url" in settings.model_fields_set:
        raise SettingsError("redis_url, redis_url_file: only one of them can be given")
    try:
        lines = file.read_text("utf-8").split()
    except OSError as error:
        raise SettingsError(f"redis_url_file: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"redis_url_file: {file} is not text") from None
    if len(lines) != 1:
        raise SettingsError(f"redis_url_file: {file} must have one line, which is the URL")
    return settings.model_copy(update={"redis_url": SecretStr(lines[0])})


def _flags(given: list[str]) -> CliSettingsSource[Settings]:
    return CliSettingsSource(Settings, cli_parse_args=given, add_argument_method=_add_flag)


def _add_flag(parser: ArgumentParser, *names: str, **about: Any) -> None:
    """As its user knows it: with the values that it takes, and not the Python type that they become."""
    field = Settings.model_fields.get(names[0].removeprefix("--").replace("-", "_"))
    if field is not None:  # not --help itself
        about["metavar"] = _bounds(field) or VALUES.get(about["metavar"], about["metavar"])
        about["help"] = f"{field.description} (default: {_shown(field.default)})"
    parser.add_argument(*names, **about)


def _bounds(field: FieldInfo) -> str:
    """Of a number; else empty."""
    least = [_shown(bound.ge) for bound in field.metadata if hasattr(bound, "ge")]
    most = [_shown(bound.le) for bound in field.metadata if hasattr(bound, "le")]
    return "..".join(least + most)


def _shown(value: object) -> str:
    """As its user would write it."""
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.15g}"
        case SecretStr():  # a default is no secret
            return value.get_secret_value()
        case frozenset():
            return ",".join(sorted(value)) or "none"
        case None:
            return "none"
    return str(value)


class _Given(Settings):
    """From nowhere else."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def packed(settings: Settings) -> dict[str, object]:
    """For another process, secrets included; `unpacked` is its inverse."""
    return settings.model_dump(mode="json") | {"redis_url": settings.redis_url.get_secret_value()}


def unpacked(fields: Mapping[str, Any]) -> Settings:
    """What another process has packed, whatever variables and files say by now."""
    return _Given(**fields)


def _sentence(problem: Mapping[str, Any]) -> str:
    name = ".".join(map(str, problem["loc"])) or "settings"
    if problem["type"] == "extra_forbidden":  # only the file can hold one: flags are refused before
        return f"{os.environ.get(FILE_VARIABLE)}: unknown setting {name!r}{_hint(name, Settings.model_fields)}"
    return f"{name}: {problem['msg']}"


def _unknown_variables() -> list[str]:
    settings = [FILE_VARIABLE, *(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)]
    given = (name.upper() for name in os.environ)
    unknown = sorted(name for name in given if name.startswith(PREFIX) and name not in {*settings, *OTHER_VARIABLES})
    return [f"unknown variable {name}{_hint(name, settings)}" for name in unknown]


def _hint(name: str, known: Iterable[str]) -> str:
    """What was probably meant; a prefix that all share says nothing."""
    stems = {candidate.removeprefix(PREFIX): candidate for candidate in known}
    similar = difflib.get_close_matches(name.removeprefix(PREFIX), stems, n=1)
    return f"; did you mean {stems[similar[0]]!r}?" if similar else ""
