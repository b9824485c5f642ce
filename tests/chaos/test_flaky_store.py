"""Whole jobs through a store that fails one request in five."""

import json
import os
import subprocess
import sys
from pathlib import Path

import local_training
import pytest
from flaky_proxy import FAULTS, FlakyProxy

from covergenre.cli import main
from covergenre.io import storage

# One process, which embeds one Ray for `prepare`; the losses of workers are tested elsewhere.
COMMANDS = """
import json, sys
from local_training import training_in_this_process
from covergenre.cli import main
with training_in_this_process():
    for arguments in json.loads(sys.argv[1]):
        main(arguments)
"""


def job(place: str, catalog: str) -> list[list[str]]:
    dataset, model, labels = (f"{place}/{name}" for name in ("dataset", "model", "labels"))
    train = ["--model", "tiny", "--epochs", "2", "--batch-size", "9", "--checkpoint-every", "4"]
    return [
        ["prepare", catalog, "--out", dataset, "--shard-rows", "20", "--min-share", "0"],
        ["train", dataset, "--out", model, *train],
        ["score", model, catalog, "--out", labels, "--part-rows", "16"],
    ]


def result(place: str) -> dict[str, bytes]:
    """What the job made, without notes of time and place."""
    noted = {
        "run",
        "plan",
        "_manifest",
        "bundle",
        "config",
        "history",
        "README",
        "_ledger",
        "metrics",
        "_metrics",
    }
    return {
        name: storage.read_bytes(f"{place}/{name}")
        for name in storage.list_sizes(place)
        if Path(name).stem not in noted and not name.endswith(".png")
    }


@pytest.mark.chaos
@pytest.mark.usefixtures("local_ray")
def test_all_stages_through_a_flaky_store_give_the_same_results(
    s3: str, synthetic_catalog: Path
) -> None:
    place, calm = f"{s3}/job/flaky", f"{s3}/job/calm"
    header, first, *rest = synthetic_catalog.read_text().splitlines()
    rest[40] = rest[40].replace(".jpg", "-missing.jpg")
    catalog = f"{s3}/job/catalog/catalog.csv"
    storage.put(catalog, "\n".join([header, first, *rest, first]).encode())
    for cover in (synthetic_catalog.parent / "covers").iterdir():
        storage.put_file(f"{s3}/job/catalog/covers/{cover.name}", cover)
    with FlakyProxy(os.environ["AWS_ENDPOINT_URL"], stall_seconds=1) as proxy:
        environment = os.environ | {
            "AWS_ENDPOINT_URL": proxy.url,
            "RAY_ADDRESS": "",
            "PYTHONPATH": str(Path(local_training.__file__).parent),
        }
        command = [sys.executable, "-c", COMMANDS, json.dumps(job(place, catalog))]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
        print(dict(sorted(proxy.counts.items())))
        assert all(proxy.faults()[fault] for fault in set(FAULTS)), proxy.counts
    with local_training.training_in_this_process():
        for arguments in job(calm, catalog):
            main(arguments)
    ledger = storage.read_json(f"{place}/labels/_ledger.json")
    counts = [ledger[name] for name in ("rows", "scored", "rejected", "duplicates")]
    assert counts == [151, 149, 1, 1]
    found, expected = result(place), result(calm)
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name
    for name in ("dataset/_manifest.json", "model/bundle.json", "labels/_ledger.json"):
        ids = ("dataset_id", "weights_id", "counts", "reasons", "parts_written")
        one, other = (storage.read_json(f"{where}/{name}") for where in (place, calm))
        assert [one.get(key) for key in ids] == [other.get(key) for key in ids]
