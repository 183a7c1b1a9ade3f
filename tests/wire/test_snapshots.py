"""Copies of sessions between real servers, through our client and without it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from models.recurrent import NetworkSpec
from rnnserve import (
    AsyncClient,
    BundleMismatch,
    Client,
    Draining,
    FieldInvalid,
    MessageTooLarge,
    ModelNotFound,
    NotEnabled,
    ResumePoint,
    SessionNotFound,
    SnapshotInvalid,
    Stream,
)
from rnnserve.cli.app import app
from rnnserve.v1 import session_service_pb2 as pb
from rnnserve.v1.session_service_pb2_grpc import SessionServiceStub
from tests.support.bundles import accumulated, features, manifest, write_bundle
from tests.support.copies import parked, session_ids, sums_after
from tests.support.server import RunningServer, start_server
from tests.support.wire import TIMEOUT_S, live_stream, open_, random_steps, refusal_of

TOKEN = b"0123456789abcdef"
KEYS = f"2026-11:{'5a' * 32}\n"
VALUES = [float(i % 7) for i in range(64)]
STATEFUL = ("vanilla", "text", "stacked", "accumulator")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEYS)
    return file


@pytest.fixture(scope="module")
def servers(repository: Path, key_file: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Two of the same bundles and the same key, each with its own sessions."""
    with ExitStack() as running:
        first, second = (
            running.enter_context(start_server(repository, snapshot_key_file=key_file, max_message_bytes=8_192))
            for _ in range(2)
        )
        yield first, second


@pytest.fixture
def here(servers: tuple[RunningServer, RunningServer]) -> Iterator[Client]:
    with Client(servers[0].target) as client:
        yield client


@pytest.fixture
def there(servers: tuple[RunningServer, RunningServer]) -> Iterator[Client]:
    with Client(servers[1].target) as client:
        yield client


def inputs_of(model: str) -> list[Any]:
    if model == "text":
        return list("abc cab bca acb " * 4)
    if model == "accumulator":
        return [[value] for value in VALUES]
    return list(random_steps(64, seed=5))


def outputs(stream: Stream, inputs: list[Any]) -> NDArray[np.float32]:
    return np.stack([answer.output for answer in stream.steps(inputs)])


@pytest.mark.parametrize("model", STATEFUL)
def test_an_import_goes_on_elsewhere_as_if_nothing_had_been(here: Client, there: Client, model: str) -> None:
    inputs = inputs_of(model)
    with here.stream(model) as stream:
        before = outputs(stream, inputs[:30])
        snapshot = here.export_session(stream.session)
        uninterrupted = outputs(stream, inputs[30:])
    point = there.import_session(snapshot.data)
    assert (snapshot.model, snapshot.next_step, point.answered_step) == (model, 30, 30)
    with there.stream(model, resume=point) as stream:
        assert (stream.next_step, stream.missed) == (30, [])
        after = outputs(stream, inputs[30:])
    assert len(before) == 30
    assert np.all(np.abs(after - uninterrupted) <= 1e-5 * np.maximum(1, np.abs(uninterrupted)))


def test_the_state_of_an_import_has_the_very_bytes_of_the_original(here: Client, there: Client) -> None:
    with here.stream("stacked") as stream:
        outputs(stream, inputs_of("stacked"))
        exported = here.export_session(stream.session)
    point = there.import_session(exported.data)
    again = there.export_session(point.session)
    times_and_signature = 2 * 9 + 32  # at the end
    assert again.data[:-times_and_signature] == exported.data[:-times_and_signature]


def test_a_parked_session_is_exported_from_the_store(here: Client, there: Client) -> None:
    parked(here, "exported-parked", VALUES[:20])
    for _ in range(2):  # the session itself stays
        point = there.import_session(here.export_session("exported-parked").data)
        assert sums_after(there, point) == accumulated([*VALUES[:20], 0.0])[-1]


def test_a_snapshot_says_in_clear_what_it_is(here: Client) -> None:
    with here.stream("accumulator") as stream:
        stream.step([1.0])
        snapshot = here.export_session(stream.session)
        assert stream.session.encode() not in snapshot.data
    model = here.model("accumulator")
    assert (snapshot.model, snapshot.version, snapshot.weights_sha256) == ("accumulator", 1, model.weights_sha256)
    assert snapshot.expires_at is not None
    assert (snapshot.expires_at - snapshot.created_at).total_seconds() == pytest.approx(86_400, abs=0.001)
    assert snapshot.key_id == "2026-11"


def test_an_import_is_parked_and_survives_a_crash_right_behind_it(
    here: Client, repository: Path, key_file: Path, tmp_path: Path
) -> None:
    parked(here, "before-the-crash", VALUES[:9])
    data = here.export_session("before-the-crash").data
    with (
        start_server(repository, tmp_path, snapshot_key_file=key_file, checkpoint_interval_s=3_600) as server,
        Client(server.target) as client,
    ):
        imported = client.import_session(data, session="imported")
        forked = client.fork_session("imported", session="forked")
        assert [(info.id, info.live, info.next_step) for info in client.sessions()] == [
            ("forked", False, 9), ("imported", False, 9),
        ]  # fmt: skip
        server.kill()
    with start_server(repository, tmp_path) as server, Client(server.target) as client:
        for point in (imported, forked):
            assert sums_after(client, point) == accumulated([*VALUES[:9], 0.0])[-1]


def test_wrong_snapshots_are_refused_and_leave_nothing_behind(here: Client, there: Client) -> None:
    parked(here, "good", VALUES[:5])
    data, before = here.export_session("good").data, session_ids(there)
    changed = data[:60] + bytes([data[60] ^ 1]) + data[61:]
    for wrong in (b"", b"x" * 100, data[:-1], data + b"\0", changed):
        with pytest.raises(SnapshotInvalid) as refusal:
            there.import_session(wrong, session="wrong")
        assert (refusal.value.field, refusal.value.metadata) == ("snapshot", {"why": "damaged"})
    assert session_ids(there) == before
    assert sums_after(there, there.import_session(data, session="wrong"))  # whose id was left free


def test_a_snapshot_is_good_for_as_long_as_the_server_says_that_made_it(
    there: Client, repository: Path, key_file: Path
) -> None:
    with (
        start_server(repository, snapshot_key_file=key_file, snapshot_lifetime_s=0.000_001) as server,
        Client(server.target) as client,
    ):
        parked(client, "soon-expired", [1.0])
        data = client.export_session("soon-expired").data
    before = session_ids(there)
    with pytest.raises(SnapshotInvalid) as refusal:
        there.import_session(data)
    assert refusal.value.metadata == {"why": "expired"}
    assert session_ids(there) == before


def test_a_snapshot_larger_than_a_message_may_be_is_refused_as_such(there: Client) -> None:
    with pytest.raises(MessageTooLarge) as refusal:
        there.import_session(bytes(8_192), session="large")
    assert refusal.value.metadata == {"limit": "8192"}


def test_an_id_in_use_is_not_taken_not_even_with_its_token(servers: tuple[RunningServer, RunningServer]) -> None:
    with grpc.insecure_channel(servers[0].target) as channel:
        stub, opening = SessionServiceStub(channel), open_("accumulator", "in-use", token=TOKEN)
        with live_stream(channel, opening) as stream:
            stream.step([[1.0]])
            snapshot = stub.ExportSession(pb.ExportSessionRequest(session_id="in-use"), timeout=TIMEOUT_S).snapshot
            with pytest.raises(grpc.RpcError) as ended:
                stub.ImportSession(
                    pb.ImportSessionRequest(snapshot=snapshot.data, session_id="in-use", resume_token=TOKEN),
                    timeout=TIMEOUT_S,
                )
            assert (refusal_of(ended.value).reason, refusal_of(ended.value).field) == ("SESSION_EXISTS", "session_id")
            with pytest.raises(grpc.RpcError) as ended:
                stub.ForkSession(
                    pb.ForkSessionRequest(session_id="in-use", new_session_id="in-use", new_resume_token=TOKEN),
                    timeout=TIMEOUT_S,
                )
            assert refusal_of(ended.value).field == "new_session_id"
            assert stream.step([[2.0]]).tolist() == [[3.0, 1.0]]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ImportSessionRequest(session_id="no spaces", resume_token=TOKEN), "session_id"),
        (pb.ImportSessionRequest(session_id="a"), "resume_token"),
        (pb.ForkSessionRequest(session_id="a", new_session_id="", new_resume_token=TOKEN), "new_session_id"),
        (pb.ForkSessionRequest(session_id="a", new_session_id="b", new_resume_token=b"short"), "new_resume_token"),
    ],
)
def test_a_bad_id_or_token_is_refused_by_its_field(
    servers: tuple[RunningServer, RunningServer], request_: Any, field: str
) -> None:
    with grpc.insecure_channel(servers[0].target) as channel:
        method = getattr(SessionServiceStub(channel), type(request_).__name__.removesuffix("Request"))
        with pytest.raises(grpc.RpcError) as ended:
            method(request_, timeout=TIMEOUT_S)
    assert (refusal_of(ended.value).reason, refusal_of(ended.value).field) == ("FIELD_INVALID", field)


def test_what_is_not_there_can_be_neither_exported_nor_forked(here: Client) -> None:
    before = session_ids(here)
    with pytest.raises(SessionNotFound):
        here.export_session("nobody")
    with pytest.raises(SessionNotFound):
        here.fork_session("nobody")
    with pytest.raises(FieldInvalid):
        here.import_session(b"", session="no spaces")
    assert session_ids(here) == before


def test_a_server_of_other_weights_or_without_the_model_refuses(here: Client, key_file: Path, tmp_path: Path) -> None:
    with here.stream("vanilla", version=1) as stream:
        outputs(stream, inputs_of("vanilla"))
        vanilla = here.export_session(stream.session).data
    parked(here, "not-served-there", [1.0])
    accumulator = here.export_session("not-served-there").data
    spec = write_other_vanilla(tmp_path / "repository")
    with start_server(spec, snapshot_key_file=key_file) as server, Client(server.target) as client:
        for data, model, kind in (
            (vanilla, "vanilla", BundleMismatch),
            (accumulator, "accumulator", ModelNotFound),
        ):
            with pytest.raises(kind) as refusal:
                client.import_session(data)
            assert refusal.value.metadata == {"model": model}
        assert client.sessions() == []


def test_a_server_that_drains_still_exports_but_begins_nothing(repository: Path, key_file: Path) -> None:
    with (
        start_server(repository, snapshot_key_file=key_file, drain_timeout_s=60) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, open_("accumulator", "stays")) as stream,
        Client(server.target) as client,
    ):
        stream.step([[1.0], [2.0]])
        server.terminate()
        assert stream.read().HasField("notice")
        snapshot = client.export_session("stays")
        assert snapshot.next_step == 2
        with pytest.raises(Draining):
            client.fork_session("stays")
        with pytest.raises(Draining):
            client.import_session(snapshot.data)
        server.kill()


def write_other_vanilla(repository: Path) -> Path:
    network = NetworkSpec(cell="tanh", features=3, hidden_size=8, outputs=4)
    write_bundle(repository, manifest("vanilla", network, features(3)), seed=99)
    return repository


def test_without_a_key_file_only_forks_are_done(server: RunningServer) -> None:
    with Client(server.target) as client:
        parked(client, "keyless", [1.0, 2.0])
        for refused in (lambda: client.export_session("keyless"), lambda: client.import_session(b"")):
            with pytest.raises(NotEnabled) as refusal:
                refused()
            assert refusal.value.metadata == {"setting": "snapshot_key_file"}
        assert sums_after(client, client.fork_session("keyless")) == (3.0, 4.0)


def test_where_sessions_end_with_their_streams_there_is_nothing_to_park(
    here: Client, repository: Path, key_file: Path
) -> None:
    parked(here, "to-nowhere", [1.0])
    data = here.export_session("to-nowhere").data
    with (
        start_server(repository, snapshot_key_file=key_file, resume_window_s=0) as server,
        Client(server.target) as client,
    ):
        with pytest.raises(NotEnabled) as refusal:
            client.import_session(data)
        assert refusal.value.metadata == {"setting": "resume_window_s"}
        with client.stream("accumulator", session="live") as stream, pytest.raises(NotEnabled):
            client.fork_session(stream.session)


async def test_a_program_awaits_the_same(servers: tuple[RunningServer, RunningServer]) -> None:
    async with AsyncClient(servers[0].target) as here, AsyncClient(servers[1].target) as there:
        async with here.stream("accumulator") as stream:
            await stream.step([4.0])
            snapshot = await here.export_session(stream.session)
            fork = await here.fork_session(stream.session, session="awaited")
        for client, point in ((there, await there.import_session(snapshot.data)), (here, fork)):
            async with client.stream("accumulator", resume=point) as copy:
                assert (await copy.step([1.0])).output.tolist() == [5.0, 4.0]


def test_the_command_line_saves_begins_and_forks(
    servers: tuple[RunningServer, RunningServer], here: Client, there: Client, tmp_path: Path
) -> None:
    parked(here, "from-the-command-line", [1.0, 2.0])
    file = str(tmp_path / "saved")

    def run(server: RunningServer, *arguments: str) -> Any:
        done = CliRunner().invoke(app, ["--target", server.target, *arguments])
        assert done.exit_code == 0, done.stderr
        return done

    saved = run(servers[0], "export", "from-the-command-line", file)
    assert f"wrote {file}: accumulator v1 before step 2; it can be imported until " in saved.stderr
    clear = json.loads(run(servers[0], "--json", "export", "from-the-command-line", file).stdout)
    assert (clear["model"], clear["next_step"], clear["key_id"]) == ("accumulator", 2, "2026-11")
    assert "data" not in clear
    imported = json.loads(run(servers[1], "--json", "import", file, "--session", "named").stdout)
    assert imported["session"] == "named"
    assert sums_after(there, ResumePoint(**imported)) == (3.0, 4.0)
    forked = json.loads(run(servers[0], "--json", "fork", "from-the-command-line").stdout)
    assert sums_after(here, ResumePoint(**forked)) == (3.0, 4.0)
    assert "is parked at step 2" in run(servers[0], "fork", "from-the-command-line").stderr
