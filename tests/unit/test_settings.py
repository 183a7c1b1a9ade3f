import json
import os
import re
import traceback
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, packed, read_settings, unpacked


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """None from outside."""
    for name in os.environ:
        if name.upper().startswith("RNNSERVE_"):
            monkeypatch.delenv(name)


def use_file(monkeypatch: pytest.MonkeyPatch, file: Path, content: str | bytes) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("RNNSERVE_SETTINGS_FILE", str(file))


def test_the_defaults_are_those_of_the_documentation() -> None:
    settings = read_settings([])
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 50051, 9464)
    assert settings.model_repository == Path("models/repository")
    assert settings.state_dir == Path(".state")


def test_a_variable_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNSERVE_PORT", "1234")
    assert read_settings([]).port == 1234


def test_a_flag_sets() -> None:
    settings = read_settings(["--port", "1234", "--model-repository=/srv/models", "--drain-timeout-s", "0"])
    assert (settings.port, settings.model_repository, settings.drain_timeout_s) == (1234, Path("/srv/models"), 0.0)


def test_a_file_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_file(monkeypatch, tmp_path / "rnnserve.toml", 'port = 1234\nhost = "0.0.0.0"\n')
    settings = read_settings([])
    assert (settings.port, settings.host) == (1234, "0.0.0.0")


def test_names_of_models_have_commas_between_them_and_are_a_list_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert read_settings([]).bfloat16_models == frozenset()
    use_file(monkeypatch, tmp_path / "rnnserve.toml", 'bfloat16_models = ["speaker", "activity"]\n')
    assert read_settings([]).bfloat16_models == {"speaker", "activity"}
    monkeypatch.setenv("RNNSERVE_BFLOAT16_MODELS", "speaker, diacritics")
    assert read_settings([]).bfloat16_models == {"speaker", "diacritics"}
    assert read_settings(["--bfloat16-models", "speaker,activity"]).bfloat16_models == {"speaker", "activity"}


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_file(monkeypatch, tmp_path / "rnnserve.toml", "port = 1\nmetrics_port = 2\nmax_sessions = 3\n")
    monkeypatch.setenv("RNNSERVE_PORT", "11")
    monkeypatch.setenv("RNNSERVE_METRICS_PORT", "12")
    settings = read_settings(["--port", "111"])
    assert (settings.port, settings.metrics_port, settings.max_sessions) == (111, 12, 3)


@pytest.mark.parametrize(
    ("flags", "name", "bound"),
    [
        (["--port", "65536"], "port", "65535"),
        (["--metrics-port", "-1"], "metrics_port", "0"),
        (["--max-message-bytes", "10"], "max_message_bytes", "1024"),
        (["--max-message-bytes", "67108865"], "max_message_bytes", "67108864"),
        (["--max-sessions", "0"], "max_sessions", "1"),
        (["--max-steps-per-message", "100001"], "max_steps_per_message", "100000"),
        (["--sequence-niceness", "20"], "sequence_niceness", "19"),
        (["--drain-timeout-s", "-0.5"], "drain_timeout_s", "0"),
        (["--drain-timeout-s", "nan"], "drain_timeout_s", ""),
        (["--max-bfloat16-loss-points", "10.5"], "max_bfloat16_loss_points", "10"),
        (["--max-bfloat16-loss-points", "-1"], "max_bfloat16_loss_points", "0"),
        (["--port", "many"], "port", "integer"),
        (["--log-level", "loud"], "log_level", "'debug'"),
    ],
)
def test_a_setting_out_of_bounds_is_named_with_its_bound(flags: list[str], name: str, bound: str) -> None:
    with pytest.raises(SettingsError) as problem:
        read_settings(flags)
    assert str(problem.value).startswith(f"{name}: ")
    assert bound in str(problem.value)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNSERVE_MAX_SESSIONS", "few")
    with pytest.raises(SettingsError, match=r"^max_sessions: "):
        read_settings([])


def test_each_wrong_setting_gets_a_sentence() -> None:
    with pytest.raises(SettingsError, match=r"port: .*; max_sessions: "):
        read_settings(["--port", "-1", "--max-sessions", "0"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("prot = 1234\n", "unknown setting 'prot'; did you mean 'port'?"),
        ("max-streams = 5\n", "unknown setting 'max-streams'; did you mean 'max_streams'?"),
        ("colour = 'red'\n", "unknown setting 'colour'"),
        ("[server]\nport = 1\n", "unknown setting 'server'"),
    ],
)
def test_an_unknown_setting_of_the_file_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, sentence: str
) -> None:
    use_file(monkeypatch, tmp_path / "rnnserve.toml", content)
    with pytest.raises(SettingsError) as problem:
        read_settings([])
    assert str(problem.value) == f"{tmp_path / 'rnnserve.toml'}: {sentence}"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("RNNSERVE_PRT", "unknown variable RNNSERVE_PRT; did you mean 'RNNSERVE_PORT'?"),
        ("RNNSERVE_SETTING_FILE", "unknown variable RNNSERVE_SETTING_FILE; did you mean 'RNNSERVE_SETTINGS_FILE'?"),
        ("RNNSERVE_COLOUR", "unknown variable RNNSERVE_COLOUR"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    monkeypatch.setenv(name, "50061")
    with pytest.raises(SettingsError) as problem:
        read_settings([])
    assert str(problem.value) == sentence


def test_an_unknown_variable_is_named_beside_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNSERVE_PRT", "50061")
    with pytest.raises(SettingsError, match=r"RNNSERVE_PRT; .*; max_sessions: "):
        read_settings(["--max-sessions", "0"])


@pytest.mark.parametrize("name", ["RNNSERVE_TARGET", "RNNSERVE_TOKEN", "RNNSERVE_CACHE"])
def test_the_variables_of_the_client_and_of_training_are_none_of_its_business(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "something")
    assert read_settings([]).port == 50051


@pytest.mark.parametrize("content", ["port = = 1", b"\xff\xfe\x00"])
def test_a_file_that_is_no_toml_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | bytes
) -> None:
    use_file(monkeypatch, tmp_path / "rnnserve.toml", content)
    with pytest.raises(SettingsError, match=r"RNNSERVE_SETTINGS_FILE: .*rnnserve\.toml cannot be read"):
        read_settings([])


def test_a_file_that_may_not_be_read_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "rnnserve.toml"
    use_file(monkeypatch, file, "port = 1")
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(SettingsError, match=r"rnnserve\.toml cannot be read: .*Permission denied"):
        read_settings([])


@pytest.mark.parametrize("place", ["missing.toml", "."])
def test_a_file_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    monkeypatch.setenv("RNNSERVE_SETTINGS_FILE", str(tmp_path / place))
    with pytest.raises(SettingsError, match=r"RNNSERVE_SETTINGS_FILE: .* is not a file"):
        read_settings([])


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"[--{name.replace('_', '-')} " in text


def test_help_says_what_to_write_and_not_what_python_makes_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    text = capsys.readouterr().out
    for written in (
        "--port 0..65535",
        "--store-timeout-s 0.05..600",
        "--power-loss-safe {true,false}",
        "--snapshot-key-file PATH",
        "--bfloat16-models NAME,NAME",
        "RNNSERVE_BFLOAT16_MODELS=speaker,activity",
    ):
        assert written in text
    assert re.findall(r"\b(?:str|int|float|bool|Path|\w*Str|frozenset|None|null|True|False)\b", text) == []


def test_what_one_process_is_told_by_another_is_all_that_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = read_settings(
        [
            "--redis-url",
            "redis://:secret@host:1/0",
            "--state-dir",
            str(tmp_path),
            "--workers",
            "2",
            "--bfloat16-models",
            "a,b",
        ]
    )
    monkeypatch.setenv("RNNSERVE_WORKERS", "3")
    monkeypatch.setenv("RNNSERVE_SETTINGS_FILE", "/no/such/file")
    told = unpacked(json.loads(json.dumps(packed(settings))))
    assert told.model_dump() == settings.model_dump()
    assert told.redis_url.get_secret_value() == "redis://:secret@host:1/0"


@pytest.mark.parametrize(
    "content", ["redis://:hush@host:1/0", "redis://:hush@host:1/0\n", "\nredis://:hush@host:1/0\r\n"]
)
def test_the_url_of_redis_can_stand_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    file = tmp_path / "redis_url"
    file.write_text(content)
    monkeypatch.setenv("RNNSERVE_REDIS_URL_FILE", str(file))
    settings = read_settings([])
    assert settings.redis_url.get_secret_value() == "redis://:hush@host:1/0"
    assert "hush" not in repr(settings)
    file.unlink()
    assert unpacked(json.loads(json.dumps(packed(settings)))).redis_url == settings.redis_url


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must have one line"),
        (b" \n", "must have one line"),
        (b"redis://:hush@host:1/0\nredis://:hush@host:2/0\n", "must have one line"),
        (b"\xffhush", "is not text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_without_one_url_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "redis_url"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("RNNSERVE_REDIS_URL_FILE", str(file))
    with pytest.raises(SettingsError) as problem:
        read_settings([])
    assert str(problem.value).startswith(f"redis_url_file: {file} {sentence}")
    assert "hush" not in "".join(traceback.format_exception(problem.value))


def test_a_url_and_a_file_with_one_are_not_both_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "redis_url").write_text("redis://:hush@host:1/0")
    monkeypatch.setenv("RNNSERVE_REDIS_URL_FILE", str(tmp_path / "redis_url"))
    with pytest.raises(SettingsError, match=r"^redis_url, redis_url_file: only one") as problem:
        read_settings(["--redis-url", "redis://:loud@host:1/0"])
    assert "hush" not in str(problem.value)
    assert "loud" not in str(problem.value)
