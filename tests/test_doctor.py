"""What `doctor` finds."""

import json

import pytest
from packaging.requirements import Requirement

from jaxspec import doctor
from jaxspec.cli import main
from jaxspec.doctor import Finding


def test_every_subject_has_one_line(capsys):
    assert main(["doctor", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["subject"] for row in rows] == [
        *("versions", "devices", "memory", "speeds", "compiled programs"),
        *("default target", "hub"),
        *("extra serve", "extra plots", "extra tensorboard", "extra wandb"),
        *("extra datasets", "extra data", "extra cuda"),
    ]
    assert not any(row["fault"] for row in rows)
    assert "GB/s" in rows[3]["found"] and "--dtype" in rows[3]["advice"]


def test_people_see_advice_under_what_was_found(capsys, monkeypatch):
    found = [Finding("memory", "2 GB"), Finding("hub", "no", "go online", fault=True)]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == (
        "  memory            2 GB\n! hub               no\n                    -> go online\n"
    )


def test_a_look_that_fails_is_a_finding():
    def compiled_programs():
        raise RuntimeError("broken")

    found = Finding("compiled programs", "RuntimeError: broken", "see the error", True)
    assert doctor._looked(compiled_programs) == found


def test_a_gpu_that_jax_does_not_see(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    found = doctor.devices()
    assert found.found.endswith("JAX does not see the machine's NVIDIA GPU")
    assert found.advice.startswith("pip install 'jax[cuda13]'")


@pytest.mark.parametrize(
    "needs, lacks",
    [("numpy", None), ("numpy<1", "numpy"), ("no-such-package>=1", "no-such-package")],
)
def test_what_is_lacking(needs, lacks):
    found = doctor._lacking(Requirement(needs))
    assert (found and found.name) == lacks


def test_an_extra_is_installed_as_the_project_asks(monkeypatch):
    """With JAX's own extra, which pins its plugins to JAX's version."""
    monkeypatch.setattr(doctor, "EXTRAS", ("cuda",))
    monkeypatch.setattr(doctor, "_lacking", lambda _: Requirement("jax-cuda13-plugin"))
    (found,) = doctor.extras()
    assert found.found == "not installed: jax-cuda13-plugin"
    assert found.advice.startswith("pip install 'jax[cuda13]")
    assert "extra ==" not in found.advice
