"""Storage that fails: a flaky store, expired credentials, full disks; verbs, then whole jobs."""

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
LARGE = random.Random(0).randbytes(20_000_000)


# One request, one fault


@pytest.fixture
def calm_s3(flaky_s3: Flaky) -> Flaky:
    """The proxy does what a test tells it in `next`, and nothing else."""
    flaky_s3[1].one_in = 0
    return flaky_s3


@pytest.mark.parametrize("fault", FORMS)
def test_each_request_bears_each_fault(calm_s3: Flaky, fault: str, tmp_path: Path) -> None:
    bucket, proxy = calm_s3
    place = f"{bucket}/one-fault/{fault}"
    # Into a bucket that this process has not yet looked at, too.
    proxy.next = {k: [fault] for k in ("LIST", "PUT", "GET", "HEAD", "DELETE")} | {"none": []}
    for kind in ("CREATE", "PART", "COMPLETE"):
        proxy.next[kind] = [fault]
    storage.put(f"{place}/x", b"cover")
    assert storage.read_bytes(f"{place}/x") == b"cover"
    assert storage.stat(f"{place}/x")[0] == 5
    storage.put(f"{place}/large", LARGE)
    proxy.next["LIST"] = [fault]
    assert storage.list_sizes(place) == {"large": len(LARGE), "x": 5}
    proxy.next["GET"] = ["", fault, fault]  # the later parts of an object
    storage.get_file(f"{place}/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == LARGE
    storage.delete_file(f"{place}/x")
    proxy.next["HEAD"], proxy.next["LIST"] = [fault], [fault]
    assert not storage.exists(f"{place}/x")
    storage.delete_directory(place)
    assert not any(proxy.next.values()), "a fault was not reached"
    kinds = {kind for kind, found in proxy.counts if found not in ("", "short")}
    if fault != "short":  # where there is no body the answer is lost instead
        assert kinds == {"LIST", "PUT", "GET", "HEAD", "DELETE", "CREATE", "PART", "COMPLETE"}


@pytest.mark.parametrize("fault", FORMS)
def test_who_wrote_first_knows_it_though_the_answer_was_lost(calm_s3: Flaky, fault: str) -> None:
    bucket, proxy = calm_s3
    uri = f"{bucket}/first/{fault}"
    proxy.next["PUT"] = [fault, fault]
    assert storage.put_if_absent(uri, b"mine")
    proxy.next["PUT"], proxy.next["HEAD"] = [fault], [fault]
    assert not storage.put_if_absent(uri, b"mine")  # the same bytes, and yet another's
    assert storage.read_bytes(uri) == b"mine"


def test_an_upload_that_failed_leaves_the_object_as_it_was(
    calm_s3: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = calm_s3
    uri = f"{bucket}/kept"
    storage.put(uri, b"old")
    monkeypatch.setattr(s3_client, "READ_SECONDS", 60.0)  # nothing stalls here but a busy machine
    s3_client.reset_clients()
    said = r"kept: cannot write: the store responds SlowDown$"
    for kind in ("CREATE", "PART", "COMPLETE"):
        proxy.next[kind] = ["slow_down"] * 10
        with monkeypatch.context() as patch, pytest.raises(StorageError, match=said):
            patch.setattr(s3_client, "RETRY_TIMEOUT_SECONDS", 0.0)
            storage.put(uri, LARGE)
        proxy.next[kind] = []
        s3_client.reset_clients()
        assert storage.read_bytes(uri) == b"old"

    def torn() -> object:
        yield b"new" * 10_000_000
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        s3_module.write(uri.removeprefix("s3://"), torn())  # type: ignore[arg-type]
    assert storage.read_bytes(uri) == b"old"
    assert proxy.counts["ABORT", ""] == 3  # of four, one was never begun


def test_an_object_that_changes_while_it_is_read_is_told(calm_s3: Flaky) -> None:
    uri = f"{calm_s3[0]}/changes"
    storage.put(uri, LARGE)
    with storage.open_input(uri) as file, storage.translate_errors(uri, "read"):
        assert file.read(10) == LARGE[:10]
        storage.put(uri, LARGE[::-1])
        with pytest.raises(OSError, match="it changed while it was read"):
            file.read()


# Many requests, one in five with a fault


def each(number: int, action: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(action, range(number)))


def test_objects_come_and_go_whole(flaky_s3: Flaky) -> None:
    bucket, proxy = flaky_s3
    place = f"{bucket}/many"
    chance = random.Random(1)
    data = [chance.randbytes(chance.choice([0, 1, 1000, 300_000, 2_000_000])) for _ in range(120)]
    each(120, lambda n: storage.put(f"{place}/{n:03}", data[n]))
    assert each(120, lambda n: storage.read_bytes(f"{place}/{n:03}")) == data

    def read_as_covers_are(n: int) -> bytes:
        with storage.open_input(f"{place}/{n:03}") as file:
            assert file.size() == len(data[n])
            return bytes(file.read())

    assert each(120, read_as_covers_are) == data
    assert storage.list_sizes(place) == {f"{n:03}": len(d) for n, d in enumerate(data)}
    each(120, lambda n: storage.delete_file(f"{place}/{n:03}"))
    assert not storage.exists(place)
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


def test_of_many_claims_each_has_one_owner(flaky_s3: Flaky) -> None:
    """By one caller after another: moto does not decide between two at the same moment."""
    bucket, proxy = flaky_s3

    def claim(n: int) -> bytes:
        won = [storage.put_if_absent(f"{bucket}/claims/{n}", b"%d" % who) for who in range(2)]
        assert won == [True, False]
        return storage.read_bytes(f"{bucket}/claims/{n}")

    assert each(40, claim) == [b"0"] * 40
    assert proxy.counts["PUT", "lost"] and proxy.counts["PUT", "lost_stall"]


def test_a_list_comes_in_pages_and_goes_as_a_whole(
    flaky_s3: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = flaky_s3
    monkeypatch.setattr(s3_module, "_PAGE_KEYS", 2)
    names = [f"{n // 10}/{n:02}" for n in range(81)]
    each(len(names), lambda n: storage.put(f"{bucket}/pages/{names[n]}", b""))
    assert list(storage.list_sizes(f"{bucket}/pages")) == names
    assert proxy.counts["LIST", ""] >= 41 and proxy.counts["LIST", "short"]
    storage.delete_directory(f"{bucket}/pages")
    assert not storage.exists(f"{bucket}/pages")


# A customer's key


def test_every_object_is_under_the_customers_key(
    calm_s3: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = calm_s3
    place = f"{bucket}/keyed"
    key = tmp_path / "key"
    key.write_bytes(random.Random(3).randbytes(32))
    monkeypatch.setenv(CUSTOMER_KEY_FILE, str(key))
    s3_client.reset_clients()
    proxy.keyed.clear()
    storage.put(f"{place}/x", b"cover")
    storage.put(f"{place}/large", LARGE)
    assert storage.put_if_absent(f"{place}/first", b"1")
    assert not storage.put_if_absent(f"{place}/first", b"2")
    assert storage.read_bytes(f"{place}/x") == b"cover"
    assert storage.size(f"{place}/large") == len(LARGE)
    storage.get_file(f"{place}/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == LARGE
    assert list(storage.list_sizes(place)) == ["first", "large", "x"]
    without = {kind for (kind, keyed), count in proxy.keyed.items() if count and not keyed}
    assert without <= {"LIST", "COMPLETE", "DELETE"}, proxy.keyed
    assert {kind for kind, keyed in proxy.keyed if keyed} >= {"PUT", "GET", "CREATE", "PART"}
    if not os.environ.get("COVERGENRE_TEST_S3"):
        return  # moto takes the key and does not ask for it
    for other in (None, bytes(32)):
        if other is None:
            monkeypatch.delenv(CUSTOMER_KEY_FILE)
        else:
            key.write_bytes(other)
            monkeypatch.setenv(CUSTOMER_KEY_FILE, str(key))
        s3_client.reset_clients()
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(f"{place}/x")
        assert CUSTOMER_KEY_FILE in str(caught.value), str(caught.value)


@pytest.mark.parametrize("held", [b"short", b"%" * 44, None], ids=["short", "no base64", "gone"])
def test_what_is_no_key_is_told(
    s3: str, held: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    if held is not None:
        key.write_bytes(held)
    monkeypatch.setenv(CUSTOMER_KEY_FILE, str(key))
    s3_client.reset_clients()
    with pytest.raises(StorageError, match=CUSTOMER_KEY_FILE) as caught:
        storage.put(f"{s3}/no-key", b"x")
    assert str(key) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    s3_client.reset_clients()


# Credentials that expire


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestExpired"])
def test_expired_credentials_are_taken_up_anew(
    calm_s3: Flaky, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = calm_s3
    file = tmp_path / "credentials"
    good = (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])

    def hand_out(key: str, secret: str) -> None:
        lines = ["[default]", f"aws_access_key_id = {key}", f"aws_secret_access_key = {secret}"]
        file.write_text("\n".join(lines))

    hand_out("old", "old")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    s3_client.reset_clients()
    if not os.environ.get("COVERGENRE_TEST_S3"):  # moto knows every key
        storage.put(f"{bucket}/expiring", b"before")
    proxy.refused["old"] = code
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:  # whoever renews them is a bit late
            hand_out(*good)

    monkeypatch.setattr(retries, "_sleep", wait)
    storage.put(f"{bucket}/expiring", b"after")
    assert storage.read_bytes(f"{bucket}/expiring") == b"after"
    assert len(waits) == 3
    # Never renewed, it is one line.
    proxy.refused[good[0]] = code
    monkeypatch.setattr(s3_client, "RETRY_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(StorageError, match="credentials") as caught:
        storage.put(f"{bucket}/expiring", b"never")
    assert "\n" not in str(caught.value) and good[1] not in str(caught.value)
