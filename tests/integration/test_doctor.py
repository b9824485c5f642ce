"""doctor on a local Ray: its checks and their findings."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_dashboard import FakeDashboard

from covergenre import dependencies
from covergenre.cluster import doctor, ray_runtime
from covergenre.errors import ConfigError

ROOT = Path(__file__).parents[2]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("local_ray")
def test_healthy_cluster_has_no_failed_checks(
    tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (str(tmp_path), f"{s3}/{tmp_path.name}"):
        code = doctor.doctor(None, place, 2)
        found = lines(capsys)
        storage = [line for line in found if " storage " in line]
        assert len(storage) == 2  # the driver's, and the node's
        assert all(line.startswith("ok") and place in line for line in storage)
        assert "ok    workers: 2 CPU workers can be scheduled" in found
        assert code == (2 if any(line.startswith("FAIL") for line in found) else 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("local_ray")
def test_failed_checks_come_with_their_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(doctor, "_MIN_DISK_BYTES", 2**60)
    monkeypatch.setattr(doctor, "__version__", "9.9")  # of the driver; the node has its own
    assert doctor.doctor(None, str(file), 99) == 2
    wrong = [line for line in lines(capsys) if line.startswith("FAIL")]
    assert sum("cannot write" in line for line in wrong) == 2
    assert sum("GiB are needed" in line for line in wrong) == 1
    assert sum("99 workers" in line or "--workers 99" in line for line in wrong) == 1
    assert sum("covergenre 0" in line and "the driver has 9.9" in line for line in wrong) == 1


@pytest.mark.usefixtures("local_ray")
def test_missing_packages_of_a_node_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pickled by value, the check takes this along; the worker's own module does not have it.
    lacking = dependencies.PACKAGES | {"no-such-package": ("no_such_package", "1")}
    monkeypatch.setattr(dependencies, "PACKAGES", lacking)
    assert doctor.doctor(None, None, None) == 2
    (line,) = [line for line in lines(capsys) if "packages" in line]
    assert line.startswith("FAIL  ") and ": packages: Python " in line
    assert "no-such-package" in line and "requirements.txt" in line


@pytest.mark.usefixtures("local_ray")
def test_failing_node_check_is_one_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(uri: str | None) -> dict[str, object]:
        raise ModuleNotFoundError("No module named 'boto3'")

    here = doctor.inspect_machine(None)
    monkeypatch.setattr(doctor, "inspect_machine", lambda uri: here if uri is None else fails(uri))
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    findings = list(doctor._node_findings(nodes, here, "x"))
    assert len(findings) == 1
    seen, advice = findings[0]
    assert seen.endswith(": no answer")
    assert advice == "ModuleNotFoundError: No module named 'boto3'"


def test_node_check_imports_nothing_of_covergenre() -> None:
    program = (
        "import sys, ray.cloudpickle as cp; from covergenre import dependencies;"
        "cp.register_pickle_by_value(dependencies);"
        "sys.stdout.buffer.write(cp.dumps(dependencies.missing_requirements))"
    )
    pickled = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert pickled.returncode == 0, pickled.stderr
    # There covergenre cannot be found at all.
    load = (
        "import sys; sys.modules['covergenre'] = None;"
        "import pickle; print(repr(pickle.load(sys.stdin.buffer)()))"
    )
    loaded = subprocess.run([sys.executable, "-c", load], input=pickled.stdout, capture_output=True)
    assert (loaded.returncode, loaded.stdout) == (0, b"''\n"), loaded.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("cannot join\n  thirty\n  lines\nthe cause"), "cannot join: the cause"),
        (TimeoutError(), "TimeoutError"),
        (ConfigError("no Ray cluster answers there"), "no Ray cluster answers there"),
    ],
)
def test_failed_start_of_ray_is_one_line(
    error: Exception,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start_ray() -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_runtime, "start_ray", start_ray)
    assert doctor.doctor(None, None, None) == 2
    assert lines(capsys) == [f"FAIL  cluster: {said}"]


def test_dashboard_address_runs_the_checks_in_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with FakeDashboard() as dashboard:
        assert doctor.doctor(dashboard.url, "s3://b/x", 2) == 0
        ((_, request),) = dashboard.jobs.items()
    assert request["entrypoint"] == "python -m covergenre doctor --storage s3://b/x --workers 2"
    assert capsys.readouterr().out == dashboard.log


def test_directory_without_covergenre_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        doctor.doctor("http://127.0.0.1:9", None, None)
    assert caught.value.code == "no_source"
