"""S3 through a proxy that injects faults; a customer's key; credentials that expire."""

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from flaky_proxy import FAULTS, FlakyProxy

from covergenre.data import dataset
from covergenre.errors import StorageError
from covergenre.io import retries, s3_client, storage
from covergenre.io import s3 as s3_module
from covergenre.io.s3_errors import CUSTOMER_KEY_FILE

Flaky = tuple[str, FlakyProxy]
FORMS = sorted(set(FAULTS))
LARGE = random.Random(0).randbytes(17_000_000)  # three parts


# One fault per request


@pytest.fixture
def calm_s3(flaky_s3: Flaky) -> Flaky:
    """The proxy injects only the faults that a test sets in `next`."""
    flaky_s3[1].one_in = 0
    return flaky_s3


@pytest.mark.parametrize("fault", FORMS)
def test_each_request_succeeds_after_each_fault(calm_s3: Flaky, fault: str, tmp_path: Path) -> None:
    bucket, proxy = calm_s3
    root = f"{bucket}/one-fault/{fault}"
    # LIST is the probe of the bucket.
    proxy.next = {k: [fault] for k in ("LIST", "PUT", "GET", "HEAD", "DELETE")} | {"none": []}
    for kind in ("CREATE", "PART", "COMPLETE"):
        proxy.next[kind] = [fault]
    storage.put(f"{root}/x", b"cover")
    assert storage.read_bytes(f"{root}/x") == b"cover"
    assert storage.stat(f"{root}/x")[0] == 5
    storage.put(f"{root}/large", LARGE)
    proxy.next["LIST"] = [fault]
    assert storage.list_sizes(root) == {"large": len(LARGE), "x": 5}
    proxy.next["GET"] = ["", fault, fault]  # the later parts of an object
    storage.get_file(f"{root}/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == LARGE
    storage.delete_file(f"{root}/x")
    proxy.next["HEAD"], proxy.next["LIST"] = [fault], [fault]
    assert not storage.exists(f"{root}/x")
    storage.delete_directory(root)
    assert not any(proxy.next.values()), "a fault was not reached"
    kinds = {kind for kind, found in proxy.counts if found not in ("", "short")}
    if fault != "short":  # a response without a body is lost instead
        assert kinds == {"LIST", "PUT", "GET", "HEAD", "DELETE", "CREATE", "PART", "COMPLETE"}


@pytest.mark.parametrize("fault", FORMS)
def test_put_if_absent_knows_its_own_write_when_the_response_is_lost(
    calm_s3: Flaky, fault: str
) -> None:
    bucket, proxy = calm_s3
    uri = f"{bucket}/first/{fault}"
    proxy.next["PUT"] = [fault, fault]
    assert storage.put_if_absent(uri, b"mine")
    proxy.next["PUT"], proxy.next["HEAD"] = [fault], [fault]
    assert not storage.put_if_absent(uri, b"mine")  # the same bytes, but of another call
    assert storage.read_bytes(uri) == b"mine"


def test_failed_upload_leaves_the_object_unchanged(
    calm_s3: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = calm_s3
    uri = f"{bucket}/kept"
    storage.put(uri, b"old")
    monkeypatch.setattr(s3_client, "READ_SECONDS", 60.0)  # for a busy machine
    s3_client.reset_clients()
    for kind in ("CREATE", "PART", "COMPLETE"):
        proxy.next[kind] = ["slow_down"] * 10
        with (
            monkeypatch.context() as patch,
            pytest.raises(StorageError, match=r"/kept: .* SlowDown$"),
        ):
            patch.setattr(s3_client, "RETRY_TIMEOUT_SECONDS", 0.0)
            storage.put(uri, LARGE)
        proxy.next[kind] = []
        s3_client.reset_clients()
        assert storage.read_bytes(uri) == b"old"

    def failing() -> object:
        yield b"new" * 3_000_000  # more than one part
        raise OSError("source failed")

    with pytest.raises(OSError, match="source failed"):
        s3_module.write(uri.removeprefix("s3://"), failing())  # type: ignore[arg-type]
    assert storage.read_bytes(uri) == b"old"
    assert proxy.counts["ABORT", ""] == 3  # one of the four was not created


def test_object_that_changes_while_it_is_read_is_an_error(calm_s3: Flaky) -> None:
    uri = f"{calm_s3[0]}/changes"
    storage.put(uri, LARGE)
    with storage.open_input(uri) as file:
        assert file.read(10) == LARGE[:10]
        storage.put(uri, LARGE[::-1])
        with pytest.raises(StorageError) as caught, storage.translate_errors(uri, "read"):
            file.read()
    assert caught.value.code == "changed"


# Many requests, a fifth of them with a fault


def each(number: int, action: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(action, range(number)))


def test_objects_are_written_and_read_completely(flaky_s3: Flaky) -> None:
    bucket, proxy = flaky_s3
    root = f"{bucket}/many"
    chance = random.Random(1)
    data = [chance.randbytes(chance.choice([0, 1, 1000, 300_000, 1_000_000])) for _ in range(60)]
    each(60, lambda n: storage.put(f"{root}/{n:03}", data[n]))
    assert each(60, lambda n: storage.read_bytes(f"{root}/{n:03}")) == data

    def read_like_covers(n: int) -> bytes:
        with storage.open_input(f"{root}/{n:03}") as file:
            assert file.size() == len(data[n])
            return bytes(file.read())

    assert each(60, read_like_covers) == data
    assert storage.list_sizes(root) == {f"{n:03}": len(d) for n, d in enumerate(data)}
    each(60, lambda n: storage.delete_file(f"{root}/{n:03}"))
    assert not storage.exists(root)
    assert all(proxy.faults()[fault] for fault in FORMS), proxy.counts


def test_parquet_is_read_in_ranges(flaky_s3: Flaky) -> None:
    bucket, proxy = flaky_s3
    uri = f"{bucket}/ranges.parquet"
    chance = random.Random(2)
    images = [chance.randbytes(20_000) for _ in range(1000)]
    table = pa.table({"row": range(1000), "image": pa.array(images, pa.large_binary())})
    storage.put(uri, dataset.to_parquet(table))
    for start in range(0, 1000, 50):
        assert dataset.read_rows(uri, start, start + 50).equals(table.slice(start, 50))
    assert dataset.read_table(uri).equals(table)
    assert proxy.counts["GET", ""] > 20 and proxy.counts["GET", "short"]


def test_put_if_absent_succeeds_once_for_each_object(flaky_s3: Flaky) -> None:
    """One call after another: moto does not decide between concurrent ones."""
    bucket, proxy = flaky_s3

    def write_twice(n: int) -> bytes:
        won = [storage.put_if_absent(f"{bucket}/absent/{n}", b"%d" % who) for who in range(2)]
        assert won == [True, False]
        return storage.read_bytes(f"{bucket}/absent/{n}")

    assert each(40, write_twice) == [b"0"] * 40
    assert proxy.counts["PUT", "lost"] and proxy.counts["PUT", "lost_stall"]


def test_listing_of_many_pages(flaky_s3: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, proxy = flaky_s3
    monkeypatch.setattr(s3_module, "_PAGE_KEYS", 2)
    names = [f"{n // 10}/{n:02}" for n in range(41)]
    each(len(names), lambda n: storage.put(f"{bucket}/pages/{names[n]}", b""))
    assert list(storage.list_sizes(f"{bucket}/pages")) == names
    assert proxy.counts["LIST", ""] >= 21 and proxy.counts["LIST", "short"]
    storage.delete_directory(f"{bucket}/pages")
    assert not storage.exists(f"{bucket}/pages")


# A customer's key


def test_every_object_is_encrypted_with_the_customers_key(
    calm_s3: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = calm_s3
    root = f"{bucket}/keyed"
    key = tmp_path / "key"
    key.write_bytes(random.Random(3).randbytes(32))
    monkeypatch.setenv(CUSTOMER_KEY_FILE, str(key))
    s3_client.reset_clients()
    proxy.keyed.clear()
    storage.put(f"{root}/x", b"cover")
    storage.put(f"{root}/large", LARGE)
    assert storage.put_if_absent(f"{root}/first", b"1")
    assert not storage.put_if_absent(f"{root}/first", b"2")
    assert storage.read_bytes(f"{root}/x") == b"cover"
    assert storage.size(f"{root}/large") == len(LARGE)
    storage.get_file(f"{root}/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == LARGE
    assert list(storage.list_sizes(root)) == ["first", "large", "x"]
    without = {kind for (kind, keyed), count in proxy.keyed.items() if count and not keyed}
    assert without <= {"LIST", "COMPLETE", "DELETE"}, proxy.keyed
    assert {kind for kind, keyed in proxy.keyed if keyed} >= {"PUT", "GET", "CREATE", "PART"}
    if not os.environ.get("COVERGENRE_TEST_S3"):
        return  # moto does not require the key
    for other in (None, bytes(32)):
        if other is None:
            monkeypatch.delenv(CUSTOMER_KEY_FILE)
        else:
            key.write_bytes(other)
            monkeypatch.setenv(CUSTOMER_KEY_FILE, str(key))
        s3_client.reset_clients()
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(f"{root}/x")
        assert caught.value.code in ("customer_key", "access_denied")
        assert CUSTOMER_KEY_FILE in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"short", b"%" * 44, None], ids=["short", "not base64", "missing"]
)
def test_invalid_customer_key_is_an_error(
    s3: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
    monkeypatch.setenv(CUSTOMER_KEY_FILE, str(key))
    s3_client.reset_clients()
    with pytest.raises(StorageError, match=CUSTOMER_KEY_FILE) as caught:
        storage.put(f"{s3}/no-key", b"x")
    assert caught.value.code == "customer_key"
    assert str(key) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    s3_client.reset_clients()


# Credentials that expire


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestExpired"])
def test_expired_credentials_are_read_again(
    calm_s3: Flaky, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = calm_s3
    file = tmp_path / "credentials"
    good = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])

    def write_credentials(key: str, secret: str) -> None:
        lines = ["[default]", f"aws_access_key_id = {key}", f"aws_secret_access_key = {secret}"]
        file.write_text("\n".join(lines))

    write_credentials("old", "old")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    s3_client.reset_clients()
    if not os.environ.get("COVERGENRE_TEST_S3"):  # moto accepts every key
        storage.put(f"{bucket}/expiring", b"before")
    proxy.refused["old"] = code
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:  # they are renewed late
            write_credentials(*good)

    monkeypatch.setattr(retries, "_sleep", wait)
    storage.put(f"{bucket}/expiring", b"after")
    assert storage.read_bytes(f"{bucket}/expiring") == b"after"
    assert len(waits) == 3
    # Credentials that are never renewed.
    proxy.refused[good[0]] = code
    monkeypatch.setattr(s3_client, "RETRY_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(StorageError) as caught:
        storage.put(f"{bucket}/expiring", b"never")
    assert caught.value.code == "bad_credentials"
    assert "\n" not in str(caught.value) and good[1] not in str(caught.value)
