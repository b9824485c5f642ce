"""Storage: the same functions on a local directory and on S3."""

import json
import os
import pickle
import socket
import socketserver
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from covergenre.errors import StorageError
from covergenre.io import s3 as s3_module
from covergenre.io import s3_client, storage


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory of this test that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}/root"


def fails(action: Callable[[], object], uri: str, verb: str = "", code: str = "") -> str:
    """`action` raises a StorageError whose message is one line that begins with `uri`."""
    with pytest.raises(StorageError) as caught:
        action()
    text = str(caught.value)
    assert text.startswith(f"{uri}: ") and "\n" not in text
    assert caught.value.code == code, text
    assert isinstance(caught.value.__cause__, FileNotFoundError) == (code == "not_found"), text
    if verb:
        assert f"cannot {verb}: " in text
    return text


# On a local directory and on S3


def test_put_and_read_bytes(root: str) -> None:
    for data in (b"", b"cover", bytes(range(256)) * 24_000):
        uri = storage.join(root, "a/b.bin")
        storage.put(uri, data)
        assert storage.read_bytes(uri) == data
        assert storage.size(uri) == len(data)
    storage.put(uri, pa.py_buffer(b"buffer"))
    assert storage.read_bytes(uri) == b"buffer"


def test_stat_changes_with_the_content(root: str) -> None:
    uri = storage.join(root, "x")
    storage.put(uri, b"abc")
    before = storage.stat(uri)
    assert before == storage.stat(uri)
    assert before.size == 3 and before.mtime_ns > 0
    storage.put(uri, b"abcd")
    assert storage.stat(uri) != before


@pytest.mark.parametrize("name", ["é ü/日本", "a b", "%20", "q?x#y+z&w", "..x", "[a]*"])
def test_unusual_names(root: str, name: str) -> None:
    uri = storage.join(root, name)
    storage.put(uri, b"1")
    assert not storage.put_if_absent(uri, b"2")
    assert storage.put_if_absent(f"{uri}2", b"22")
    assert storage.read_bytes(f"{uri}2") == b"22"
    assert storage.list_sizes(root) == {name: 1, f"{name}2": 2}
    assert storage.list_files(root) == [uri, f"{uri}2"]


def test_file_is_read_at_any_offset(root: str) -> None:
    uri = storage.join(root, "x")
    storage.put(uri, b"0123456789")
    with storage.open_input(uri) as file:
        file.seek(3)
        assert file.read(4) == b"3456"
        file.seek(0)
        assert file.read() == b"0123456789"


def test_files_and_directories_are_distinguished(root: str) -> None:
    storage.put(storage.join(root, "folder/file"), b"abc")
    for name, exists, is_folder in (
        ("", True, True),
        ("folder", True, True),
        ("folder/file", True, False),
        ("folder/fil", False, False),
        ("folder/file/below", False, False),
        ("none", False, False),
    ):
        for end in ("", "/"):
            uri = (storage.join(root, name) if name else root) + end
            if end and name == "folder/file":
                continue  # not a valid name of a file: the result does not matter
            assert storage.exists(uri) == exists, uri
            assert storage.is_directory(uri) == is_folder, uri


def test_missing_file_has_the_code_not_found(root: str) -> None:
    storage.put(storage.join(root, "x"), b"")
    uri = storage.join(root, "none")
    for action in (
        storage.read_bytes,
        storage.open_input,
        storage.size,
        storage.list_files,
        storage.read_json,
    ):
        fails(lambda action=action: action(uri), uri, code="not_found")  # type: ignore[misc]
    assert not storage.exists(uri)
    assert not storage.is_directory(uri)
    assert storage.list_sizes(uri) == {}
    storage.delete_directory(uri)  # no error


def test_directory_is_not_a_file(root: str) -> None:
    storage.put(storage.join(root, "folder/x"), b"")
    folder = storage.join(root, "folder")
    fails(lambda: storage.size(folder), folder, code="not_found")
    is_s3 = folder.startswith("s3://")
    fails(lambda: storage.read_bytes(folder), folder, code="not_found" if is_s3 else "")


def test_listings_are_sorted_and_recursive(root: str) -> None:
    names = ["b", "a/z", "a/b/c", "B", "a.x", "a/b.x", "0"]
    for length, name in enumerate(names):
        storage.put(storage.join(root, name), b"x" * length)
    assert storage.list_files(root) == sorted(storage.join(root, name) for name in names)
    assert storage.list_files(root + "/") == storage.list_files(root)
    assert storage.list_sizes(root) == {name: names.index(name) for name in names}
    assert list(storage.list_sizes(root)) == sorted(names)
    assert storage.list_sizes(root + "/") == storage.list_sizes(root)
    below = storage.join(root, "a")
    assert storage.list_sizes(below) == {"b.x": 5, "b/c": 2, "z": 1}
    assert storage.list_files(below) == [storage.join(below, n) for n in ("b.x", "b/c", "z")]


def test_delete_directory_deletes_only_what_is_below_it(root: str) -> None:
    for name in ("gone/a", "gone/b/c", "gone.training/a", "kept"):
        storage.put(storage.join(root, name), b"")
    storage.delete_directory(storage.join(root, "gone"))
    assert list(storage.list_sizes(root)) == ["gone.training/a", "kept"]
    assert not storage.exists(storage.join(root, "gone"))
    storage.put(storage.join(root, "gone/again"), b"")
    assert storage.exists(storage.join(root, "gone"))


def test_put_if_absent_writes_once(root: str) -> None:
    uri = storage.join(root, "lock/run.json")
    assert storage.put_if_absent(uri, b"first")
    assert not storage.put_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    storage.put(uri, b"third")
    assert storage.read_bytes(uri) == b"third"


def test_json_is_read_as_written(root: str) -> None:
    uri = storage.join(root, "value.json")
    value = {"é": [1, 2.5, None, True], "nested": {"a": "日本"}}
    storage.put_json(uri, value)
    assert storage.read_json(uri) == value
    text = storage.read_bytes(uri).decode()
    assert text.endswith("}\n") and "日本" in text and "\n  " in text


@pytest.mark.parametrize("data", [b"", b"{", b"{'a': 1}", b"\xff\xfe\xfa", b"[1,\n2,\n}"])
def test_invalid_json_is_an_error(root: str, data: bytes) -> None:
    uri = storage.join(root, "value.json")
    storage.put(uri, data)
    fails(lambda: storage.read_json(uri), uri, code="invalid_json")


# Local directories only


def test_one_of_many_concurrent_writers_wins(tmp_path: Path) -> None:
    """On a local directory only: moto, unlike S3, does not decide this atomically."""
    for round_ in range(20):
        uri = str(tmp_path / f"file-{round_}")
        start = threading.Barrier(8)
        won: list[int] = []

        def write(writer: int, uri: str = uri, start: threading.Barrier = start) -> None:
            start.wait()
            if storage.put_if_absent(uri, b"%d" % writer * 10_000):
                won.append(writer)  # noqa: B023

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read_bytes(uri) == b"%d" % won[0] * 10_000


def test_open_file_keeps_its_old_content(tmp_path: Path) -> None:
    uri = str(tmp_path / "x")
    storage.put(uri, b"old" * 1000)
    with open(uri, "rb", buffering=0) as reader:
        assert reader.read(3) == b"old"
        storage.put(uri, b"new" * 1000)
        assert set(reader.read()) == set(b"old")
    assert storage.read_bytes(uri) == b"new" * 1000


def test_failed_put_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "x")
    storage.put(uri, b"old")
    storage.put_if_absent(uri, b"no")
    assert os.listdir(tmp_path) == ["x"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = fails(lambda: storage.put(uri, b"new"), uri, verb="write")
    assert text.endswith("No space left on device")
    fails(lambda: storage.put_if_absent(str(tmp_path / "y"), b"new"), str(tmp_path / "y"))
    assert os.listdir(tmp_path) == ["x"]
    assert storage.read_bytes(uri) == b"old"


def test_new_file_has_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    storage.put(str(tmp_path / "put"), b"")
    storage.put_if_absent(str(tmp_path / "absent"), b"")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_file_in_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder/x").mkdir(parents=True)
    below = str(tmp_path / "file/below")
    fails(lambda: storage.put(below, b""), below, verb="write")
    fails(lambda: storage.put_if_absent(below, b""), below, verb="write")
    fails(lambda: storage.read_bytes(below), below, verb="read")
    folder = str(tmp_path / "folder")
    fails(lambda: storage.put(folder, b""), folder, verb="write")
    assert os.listdir(tmp_path / "folder") == ["x"]


@pytest.mark.parametrize("uri", ["a\0b", "x" * 300, "bad-\udcff-name"])
def test_name_that_no_file_can_have_is_an_error(uri: str, tmp_path: Path) -> None:
    for action in (storage.read_bytes, storage.exists, storage.size, storage.list_sizes):
        path = f"{tmp_path}/{uri}"
        fails(lambda action=action, path=path: action(path), path)  # type: ignore[misc]


def test_relative_paths_home_and_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    storage.put("x", b"relative")
    storage.put("~/y", b"home")
    storage.put(f"file://{tmp_path}/z", b"file")
    assert storage.list_sizes(".") == {"home/y": 4, "x": 8, "z": 4}
    assert storage.read_bytes("./home/../x") == b"relative"


def test_path_objects_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "a/x"
    storage.put(file, b"abc")
    assert not storage.put_if_absent(file, b"d")
    storage.put_json(tmp_path / "a/y.json", [1])
    assert storage.read_json(tmp_path / "a/y.json") == [1]
    assert storage.read_bytes(file) == b"abc"
    assert storage.exists(file) and storage.is_directory(file.parent) and storage.size(file) == 3
    assert storage.list_files(tmp_path) == [str(file), str(tmp_path / "a/y.json")]
    assert storage.join(tmp_path, Path("a"), "x") == storage.absolute(file) == str(file)
    assert (storage.parent(file), storage.name(file)) == (str(tmp_path / "a"), "x")
    with storage.open_input(file) as opened:
        assert opened.read() == b"abc"
    storage.delete_file(file)
    storage.delete_directory(tmp_path / "a")
    assert storage.list_sizes(tmp_path) == {}
    absent = tmp_path / "absent"
    fails(lambda: storage.read_bytes(absent), str(absent), code="not_found")


def test_path_object_of_an_s3_uri_is_refused() -> None:
    """pathlib changes it to s3:/bucket/key."""
    path = Path("s3://bucket/key")
    for action in (storage.absolute, storage.read_bytes, storage.exists):
        fails(lambda action=action: action(path), str(path), code="invalid_uri")  # type: ignore[misc]


# S3 only


def test_bucket_is_never_deleted(s3: str) -> None:
    storage.put(f"{s3}/kept/x", b"")
    fails(lambda: storage.delete_directory(s3), s3, verb="delete")
    assert storage.exists(f"{s3}/kept/x")


@pytest.fixture
def fresh(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For changing AWS settings: S3 clients are new before and after the test."""
    s3_client.reset_clients()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setattr(s3_client, "PROBE_RETRY_TIMEOUT_SECONDS", 0.5)
    yield monkeypatch
    s3_client.reset_clients()


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_region_is_read_from_both_variables(
    s3: str, fresh: pytest.MonkeyPatch, variable: str
) -> None:
    """boto3 itself does not read AWS_REGION; all other AWS tools do."""
    fresh.delenv("AWS_DEFAULT_REGION", raising=False)
    fresh.delenv("AWS_REGION", raising=False)
    fresh.setenv(variable, "eu-west-3")
    assert s3_client.client().meta.region_name == "eu-west-3"


def test_region_is_optional_with_an_endpoint(s3: str, fresh: pytest.MonkeyPatch) -> None:
    fresh.delenv("AWS_DEFAULT_REGION", raising=False)
    fresh.delenv("AWS_REGION", raising=False)
    storage.put(f"{s3}/no-region", b"x")
    assert storage.read_bytes(f"{s3}/no-region") == b"x"


def closed_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
CLOSED = f"http://127.0.0.1:{closed_port()}"


@pytest.mark.parametrize(
    ("settings", "without", "code", "variable"),
    [
        ({"AWS_ENDPOINT_URL": CLOSED}, (), "no_response", "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, (), "invalid_endpoint", "AWS_ENDPOINT_URL"),
        ({}, KEYS, "no_credentials", "AWS_ACCESS_KEY_ID"),
        ({}, KEYS[1:], "no_credentials", "AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "typo"}, (), "no_profile", "AWS_PROFILE"),
    ],
)
def test_error_of_wrong_settings_has_the_variable(
    s3: str,
    fresh: pytest.MonkeyPatch,
    settings: dict[str, str],
    without: tuple[str, ...],
    code: str,
    variable: str,
) -> None:
    for name, value in settings.items():
        fresh.setenv(name, value)
    for name in without:
        fresh.delenv(name)
    for action in (storage.exists, storage.read_bytes, lambda uri: storage.put(uri, b"")):
        text = fails(lambda action=action: action(f"{s3}/x"), s3, code=code)  # type: ignore[misc]
        assert variable in text


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n"


@pytest.mark.parametrize("answer", [b"", HEAD, HEAD + b"\r\n<html></html>\n"])
def test_server_that_is_not_s3_is_an_error(
    s3: str, fresh: pytest.MonkeyPatch, answer: bytes
) -> None:
    """One that accepts connections and sends nothing, or half a response; or one of web pages."""
    fresh.setattr(s3_client, "PROBE_READ_SECONDS", 0.1)
    fresh.setattr(s3_client, "PROBE_RETRY_TIMEOUT_SECONDS", 0.5)
    over = threading.Event()

    class Silent(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            if answer:
                self.connection.recv(65536)
                self.connection.sendall(answer)
            if b"html" not in answer:
                over.wait()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            where = f"127.0.0.1:{server.server_address[1]}"
            fresh.setenv("AWS_ENDPOINT_URL", f"http://user:word@{where}")
            s3_client.client(probe=True)  # on a busy machine this takes longer than the probe
            code = "invalid_response" if b"html" in answer else "no_response"
            text = fails(lambda: storage.exists(f"{s3}/x"), s3, code=code)
        finally:
            over.set()
            server.shutdown()
            thread.join()
    assert f": http://{where}" in text and "AWS_ENDPOINT_URL" in text


def test_probe_takes_less_than_15_seconds() -> None:
    assert (
        s3_client.PROBE_RETRY_TIMEOUT_SECONDS
        + s3_client.PROBE_CONNECT_SECONDS
        + s3_client.PROBE_READ_SECONDS
        < 15
    )


def test_name_server_that_does_not_respond_does_not_block(
    s3: str, fresh: pytest.MonkeyPatch
) -> None:
    """Resolving a name has no timeout that can be set."""
    over = threading.Event()

    def resolve(*_: object, **__: object) -> list[object]:
        over.wait()
        return []

    fresh.setattr(socket, "getaddrinfo", resolve)
    for name in ("PROBE_RETRY_TIMEOUT_SECONDS", "PROBE_CONNECT_SECONDS", "PROBE_READ_SECONDS"):
        fresh.setattr(s3_client, name, 0.1)
    try:
        fails(lambda: storage.exists(f"{s3}/x"), s3, code="no_response")
    finally:
        over.set()


@pytest.mark.parametrize("bucket", ["covergenre-no-such", "_"])
def test_missing_bucket_is_an_error(s3: str, bucket: str) -> None:
    for action in (
        storage.read_bytes,
        lambda uri: storage.put(uri, b""),
        lambda uri: storage.put_if_absent(uri, b""),
    ):
        with pytest.raises(StorageError, match=f"^s3://{bucket}") as caught:
            action(f"s3://{bucket}/x")
        assert caught.value.code == "no_bucket"


@pytest.mark.skipif(not os.environ.get("COVERGENRE_TEST_S3"), reason="moto accepts any credentials")
@pytest.mark.parametrize("name", KEYS)
def test_wrong_credentials_are_an_error(s3: str, fresh: pytest.MonkeyPatch, name: str) -> None:
    fresh.setenv(name, "wrong")
    text = fails(lambda: storage.exists(f"{s3}/x"), s3, code="bad_credentials")
    assert "AWS_ACCESS_KEY_ID" in text


def test_unavailable_bucket_is_probed_again_after_a_while(
    s3: str, fresh: pytest.MonkeyPatch
) -> None:
    fresh.setenv("AWS_PROFILE", "typo")
    fails(lambda: storage.exists(f"{s3}/x"), s3, code="no_profile")
    fresh.delenv("AWS_PROFILE")
    fails(lambda: storage.exists(f"{s3}/x"), s3, code="no_profile")
    fresh.setattr(s3_module, "_PROBE_AGAIN_SECONDS", 0.0)
    assert not storage.exists(f"{s3}/x")


def test_import_changes_no_environment_variable() -> None:
    check = (
        "import os; before = dict(os.environ); import covergenre.io.s3, covergenre.io.storage;"
        "assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


CHECKSUM_VARIABLES = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "request_checksum_calculation",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "response_checksum_validation",
}


def test_checksums_are_sent_when_required_unless_set_otherwise(
    s3: str, fresh: pytest.MonkeyPatch
) -> None:
    for variable, setting in CHECKSUM_VARIABLES.items():
        fresh.delenv(variable, raising=False)
        s3_client.reset_clients()
        assert getattr(s3_client.client().meta.config, setting) == "when_required"
        fresh.setenv(variable, "when_supported")
        s3_client.reset_clients()
        assert getattr(s3_client.client().meta.config, setting) == "when_supported"


def test_filesystem_is_unpickled_in_another_process(s3: str) -> None:
    """Ray Train sends it to a process that has not imported storage."""
    system, path = storage.filesystem(f"{s3}/pickled/x")
    pickled = pickle.dumps(system)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickled or (
        os.environ["AWS_SECRET_ACCESS_KEY"] == "none"
    )
    write = (
        "import pickle, sys; system = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "assert 'covergenre.io.s3' in sys.modules\n"
        "with system.open_output_stream(sys.argv[2]) as stream: stream.write(b'content')\n"
    )
    subprocess.run([sys.executable, "-c", write, pickled.hex(), path], check=True)
    assert storage.read_bytes(f"{s3}/pickled/x") == b"content"


# URIs


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x.jpg", "hdfs://x"])
def test_other_schemes_are_refused(uri: str) -> None:
    scheme = uri.partition("://")[0]
    for action in (
        storage.read_bytes,
        storage.exists,
        storage.list_files,
        storage.list_sizes,
        storage.delete_directory,
        storage.filesystem,
        lambda uri: storage.put(uri, b""),
        lambda uri: storage.put_if_absent(uri, b""),
    ):
        text = fails(lambda action=action: action(uri), uri, code="unsupported_scheme")  # type: ignore[misc]
        assert f"{scheme}://" in text


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("/a",), "/a"),
        (("/a", "b"), "/a/b"),
        (("/a/", "b", "c/d"), "/a/b/c/d"),
        (("/a", ""), "/a/"),
        (("/a", "/b"), "/b"),
        (("/a", "/b", "c"), "/b/c"),
        (("/", "a"), "/a"),
        (("s3://b", "k"), "s3://b/k"),
        (("s3://b/", "k"), "s3://b/k"),
        (("s3://b/k", "/local"), "/local"),
        (("/a", "s3://b/k", "x"), "s3://b/k/x"),
        (("a", "b"), "a/b"),
    ],
)
def test_join(parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(*parts) == joined


@pytest.mark.parametrize(
    ("uri", "parent", "name"),
    [
        ("/a/b", "/a", "b"),
        ("/a/b/", "/a", "b"),
        ("/a", "/", "a"),
        ("a", "", "a"),
        ("a/b.csv", "a", "b.csv"),
        ("s3://bucket/a/b", "s3://bucket/a", "b"),
        ("s3://bucket/a", "s3://bucket", "a"),
    ],
)
def test_parent_and_name(uri: str, parent: str, name: str) -> None:
    assert (storage.parent(uri), storage.name(uri)) == (parent, name)
    if parent:
        assert storage.join(parent, name) == uri.rstrip("/")


def test_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for uri, expected in (
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b"),
        ("/a/../b/./c", "/b/c"),
        ("x", f"{tmp_path}/x"),
        ("./x/", f"{tmp_path}/x"),
        (".", str(tmp_path)),
        ("", str(tmp_path)),
        ("~/x", "/home/me/x"),
        ("file:///a/b", "/a/b"),
        ("file:///a%20b", "/a b"),
        ("file:/a/b", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("FILE:///a#b?c;d.jpg", "/a#b?c;d.jpg"),
        ("S3://bucket/A/", "s3://bucket/A"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("s3n://bucket/a", "s3://bucket/a"),
        ("HTTPS://host/A", "https://host/A"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("s3://bucket", "s3://bucket"),
        ("gs://bucket/a", "gs://bucket/a"),
    ):
        assert storage.absolute(uri) == expected
        assert storage.absolute(expected) == expected
    for uri in ("s3://", "s3:///", "s3:/bucket/a", "s3:", "S3A://"):
        fails(lambda uri=uri: storage.absolute(uri), uri, code="invalid_uri")  # type: ignore[misc]


def test_is_uri() -> None:
    uris = ("s3://b/k", "file:///x", "S3A://b/k", "gs://b/k", "svn+ssh://x")
    assert all(map(storage.is_uri, uris))
    assert not any(map(storage.is_uri, ("/a", "a:b", "a//b", "/a/b://c", "C://x/y", "C:/x")))


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        *(("/a", ""), ("a", ""), ("C:/x", ""), ("file:x", ""), ("data:,x", "")),
        *(("file:///x", "file"), ("FILE:/x", "file"), ("gs://b/k", "gs"), ("HTTP://x", "http")),
        *(("s3://b/k", "s3"), ("S3://b/k", "s3"), ("s3a://b/k", "s3"), ("s3n://b/k", "s3")),
    ],
)
def test_scheme(uri: str, scheme: str) -> None:
    assert storage.scheme(uri) == scheme


@pytest.mark.parametrize("uri", ["file://host/a", "file://a.jpg", "file://"])
def test_file_uri_of_another_host_is_refused(uri: str) -> None:
    fails(lambda: storage.read_bytes(uri), uri, code="invalid_uri")


@pytest.mark.parametrize("scheme", ["S3", "s3a", "s3n"])
def test_other_schemes_of_s3_are_equivalent(scheme: str, s3: str) -> None:
    storage.put(f"{s3}/named/x", b"content")
    uri = s3.replace("s3", scheme, 1) + "/named"
    assert storage.read_bytes(f"{uri}/x") == b"content"
    assert storage.list_files(uri) == [f"{s3}/named/x"]
    assert storage.is_directory(uri) and storage.size(f"{uri}/x") == 7


# Special files


def special_files(folder: Path) -> dict[str, str]:
    """Path -> kind of file, of files that are not regular ones."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    (folder / "link").symlink_to(folder / "pipe")
    kinds = {"pipe": "a pipe", "link": "a pipe", "socket": "a socket"}
    return {str(folder / name): kind for name, kind in kinds.items()} | {
        "/dev/zero": "a device",
        str(folder): "a directory",
    }


def test_only_regular_files_are_opened(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("f")
    monkeypatch.chdir(folder)  # the path of a socket must be short
    for path, kind in special_files(folder).items():
        for action in (storage.open_input, storage.read_bytes, storage.read_json):
            text = fails(lambda action=action, path=path: action(path), path)  # type: ignore[misc]
            assert kind in text
        if kind != "a directory":
            text = fails(lambda path=path: storage.size(path), path)  # type: ignore[misc]
            assert kind in text
    (folder / "file").write_bytes(b"content")
    (folder / "good-link").symlink_to("file")
    assert storage.read_bytes(str(folder / "good-link")) == b"content"


def test_pipe_of_a_shell_is_refused() -> None:
    """A process substitution, `<(...)`."""
    read_end, write_end = os.pipe()
    try:
        text = fails(lambda: storage.size(f"/dev/fd/{read_end}"), f"/dev/fd/{read_end}")
        assert "a pipe" in text
    finally:
        os.close(read_end)
        os.close(write_end)


def test_put_json_writes_indented_json(tmp_path: Path) -> None:
    storage.put_json(str(tmp_path / "x.json"), {"b": 1, "a": 2})
    assert (tmp_path / "x.json").read_text() == '{\n  "b": 1,\n  "a": 2\n}\n'
    assert json.loads((tmp_path / "x.json").read_text()) == {"b": 1, "a": 2}
