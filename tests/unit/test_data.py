import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from models import data
from models.data import Archive, DataError, read_member


def zip_of(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


CONTENT = zip_of(vowels="aeiou")
ARCHIVE = Archive("vowels", "1.0", "vowels-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RNNSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def offer(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[Archive]:
    """Let the index offer these bytes; gives the list of what was downloaded."""
    downloaded: list[Archive] = []

    def download(archive: Archive, folder: Path) -> None:
        downloaded.append(archive)
        (folder / archive.filename).write_bytes(content)

    monkeypatch.setattr(data, "_download", download)
    return downloaded


def test_a_member_is_read_without_installing_the_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, CONTENT)
    assert read_member(ARCHIVE, "vowels") == b"aeiou"


def test_an_archive_is_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = offer(monkeypatch, CONTENT)
    read_member(ARCHIVE, "vowels")
    read_member(ARCHIVE, "vowels")
    assert downloaded == [ARCHIVE]


def test_a_download_of_another_digest_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, zip_of(vowels="forged"))
    with pytest.raises(DataError, match=r"not the one meant"):
        read_member(ARCHIVE, "vowels")
    assert list(cache.iterdir()) == []


def test_a_cached_archive_that_changed_is_refused_before_it_is_opened(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (cache / ARCHIVE.filename).write_bytes(zip_of(vowels="forged"))
    opened: list[object] = []
    monkeypatch.setattr(zipfile, "ZipFile", opened.append)
    with pytest.raises(DataError, match=ARCHIVE.sha256):
        read_member(ARCHIVE, "vowels")
    assert opened == []


def test_a_missing_member_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, CONTENT)
    with pytest.raises(DataError, match="no file consonants"):
        read_member(ARCHIVE, "consonants")


def test_a_failed_download_says_what_was_wanted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"could not download vowels==1\.0"):
        read_member(ARCHIVE, "vowels")


def test_the_cache_is_in_the_home_folder_unless_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNSERVE_CACHE", raising=False)
    assert data.cache_folder() == Path.home() / ".cache" / "rnnserve"
