"""All settings of the service: by variable (RNNSERVE_PORT), flag (--port) or a TOML file (port = …).

A flag wins over a variable, a variable over the file, the file over the default.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

FILE_VARIABLE = "RNNSERVE_SETTINGS_FILE"


class SettingsError(ValueError):
    """The settings cannot be used; the message names the setting and its bound."""


class Settings(BaseSettings):
    """Limits are per service."""

    model_config = SettingsConfigDict(
        env_prefix="RNNSERVE_", extra="forbid", frozen=True, cli_kebab_case=True, cli_prog_name="python -m service"
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 = all")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 = any free one")
    metrics_port: int = Field(9464, ge=0, le=65535, description="port of /metrics; 0 = any free one")
    model_repository: Path = Field(Path("models/repository"), description="folder of <name>/<version>/ bundles")
    state_dir: Path | None = Field(
        None,
        description="folder for what the service writes: server.json with its ports while it serves; none = nothing",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    max_message_bytes: int = Field(
        4 * 2**20, ge=2**10, le=64 * 2**20, description="bytes of one message; a larger one is MESSAGE_TOO_LARGE"
    )
    max_steps_per_message: int = Field(1_000, ge=1, le=100_000, description="steps in one message of a stream")
    max_sessions: int = Field(10_000, ge=1, le=1_000_000, description="open sessions; one more is SESSION_LIMIT")
    max_tick_sessions: int = Field(256, ge=1, le=4_096, description="sessions that share one forward")
    step_threads: int = Field(1, ge=1, le=64, description="torch threads of a tick")

    max_sequence_steps: int = Field(20_000, ge=1, le=1_000_000, description="steps of one whole sequence")
    max_queued_sequences: int = Field(256, ge=1, le=100_000, description="waiting; one more is QUEUE_FULL")
    max_bulk_sequences: int = Field(64, ge=1, le=10_000, description="in flight on one bulk stream, then it waits")
    max_batch_sequences: int = Field(32, ge=1, le=1_024, description="whole sequences that share one forward")
    max_batch_steps: int = Field(
        32_768, ge=1, le=10_000_000, description="steps of such a batch, padding included; a longer sequence runs alone"
    )
    sequence_threads: int = Field(1, ge=1, le=64, description="torch threads of the lane for whole sequences")
    sequence_niceness: int = Field(10, ge=0, le=19, description="how far that lane stands back; 0 = not at all")

    drain_timeout_s: float = Field(
        10.0,
        ge=0.0,
        le=3_600.0,
        description="how long running work may take after SIGTERM, before the second that ending takes; 0 = none",
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
    try:
        return Settings(_cli_parse_args=flags)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise SettingsError("; ".join(problems)) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{FILE_VARIABLE}: {os.environ.get(FILE_VARIABLE)} cannot be read: {error}") from None
