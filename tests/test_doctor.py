"""doctor on one local Ray: what it looks at, and what it says is to be mended."""

from pathlib import Path

import pytest

from covergenre import doctor


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("local_ray")
def test_all_is_well(tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (str(tmp_path), f"{s3}/{tmp_path.name}"):
        code = doctor.doctor(None, place, 2)
        found = lines(capsys)
        storage = [line for line in found if " storage " in line]
        assert len(storage) == 2  # the driver's, and the node's
        assert all(line.startswith("ok") and place in line for line in storage)
        assert "ok    workers: 2 CPU workers can be placed" in found
        assert code == (2 if any(line.startswith("MEND") for line in found) else 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("local_ray")
def test_what_is_wrong_is_said_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(doctor, "_LEAST_DISK_BYTES", 2**60)
    monkeypatch.setattr(doctor, "__version__", "9.9")  # of the driver; the node has its own
    assert doctor.doctor(None, str(file), 99) == 2
    wrong = [line for line in lines(capsys) if line.startswith("MEND")]
    assert sum("cannot write" in line for line in wrong) == 2
    assert sum("give it at least" in line for line in wrong) == 1
    assert sum("99 workers" in line or "--workers 99" in line for line in wrong) == 1
    assert sum("covergenre 0" in line and "9.9 at the driver" in line for line in wrong) == 1
