"""What can be checked before a job is sent; the sending itself is tested on two real hosts."""

import subprocess
from pathlib import Path

import pytest

from covergenre import submit
from covergenre.errors import ConfigError


def tree(root: Path, **sizes: int) -> None:
    for name, size in sizes.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))


@pytest.mark.parametrize("git", [False, True])
def test_an_upload_that_is_too_large_names_what_is_large(
    tmp_path: Path, git: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_LARGEST_UPLOAD_BYTES", 3 * 2**20)
    tree(tmp_path, covergenre__a=1000, jobs__b=500)
    (tmp_path / ".venv").mkdir()
    tree(tmp_path / ".venv", c=5 * 2**20)
    if git:
        (tmp_path / ".gitignore").write_text(".venv/\nignored/\n")
        tree(tmp_path, ignored__x=9 * 2**20)
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert submit.check_size(tmp_path) == 1500 + (len(".venv/\nignored/\n") if git else 0)
    tree(tmp_path, covers__0=2 * 2**20, covers__1=2 * 2**20, model__weights=2**20)
    with pytest.raises(ConfigError) as error:
        submit.check_size(tmp_path)
    assert "has 5 MiB" in str(error.value)
    assert "largest: covers 4 MiB, model 1 MiB, covergenre 0 MiB; move" in str(error.value)


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = Path(__file__).parents[1]
    with pytest.raises(ConfigError, match="no Ray dashboard answers there"):
        submit.submit(
            "train", [], None, address="http://127.0.0.1:9", wait=True, working_dir=str(root)
        )
