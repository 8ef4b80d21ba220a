"""environment.yml (conda, Binder) and pyproject.toml (pip) must install the same packages in the same ranges."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = (ROOT / "environment.yml").read_text()


def differences(environment: dict[str, Any], project: dict[str, Any]) -> list[str]:
    """What `environment` installs otherwise than ``pip install -e ".[test]"`` does; an empty list if nothing."""
    conda = [Requirement(_as_pip(line)) for line in environment["dependencies"] if isinstance(line, str)]
    pip = [line for entry in environment["dependencies"] if isinstance(entry, dict) for line in entry["pip"]]
    found = [] if "-e .[test]" in pip else ["the package is not installed with its tests' tools: '-e .[test]'"]

    # The package's own requirements hold in the environment anyway; whatever is named again must say the same.
    every = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, every)}
    named = conda + [Requirement(line) for line in pip if not line.startswith("-")]
    for requirement in named:
        name = canonicalize_name(requirement.name)
        if name in ("python", "pip"):
            continue
        if name not in ranges:
            found.append(f"{name} is not in pyproject.toml")
        elif requirement.specifier != ranges[name]:
            found.append(f"{name}{requirement.specifier} here, {name}{ranges[name]} in pyproject.toml")

    python = [r.specifier for r in conda if r.name == "python"]
    floor = project["requires-python"].removeprefix(">=")
    if [str(s) for s in python] != [f"=={floor}.*"]:
        found.append(f"Python is not {floor}, the oldest that pyproject.toml allows")
    return found


def _as_pip(conda: str) -> str:
    """conda's ``name=1.2`` means what pip writes ``name==1.2.*``."""
    name, equals, version = conda.partition("=")
    plain = equals and not version.startswith("=") and name[-1] not in "<>!~"
    return f"{name}=={version}.*" if plain else conda


def test_conda_and_pip_install_the_same() -> None:
    assert differences(yaml.safe_load(ENVIRONMENT), PROJECT) == []


@pytest.mark.parametrize(("old", "new"), [
    ("- -e .[test]", "- -e ."),
    ("- python=3.11", "- python=3.12"),
    ("- python=3.11", "- python=3.11\n  - numpy>=2.3,<2.5"),
    ("- -e .[test]", "- -e .[test]\n      - nbval==0.10.*"),
    ("- -e .[test]", "- -e .[test]\n      - scipy"),
])
def test_a_difference_is_noticed(old: str, new: str) -> None:
    assert old in ENVIRONMENT
    assert differences(yaml.safe_load(ENVIRONMENT.replace(old, new)), PROJECT) != []


def test_the_lab_and_torch_for_cpu_are_what_binder_gets() -> None:
    pip = yaml.safe_load(ENVIRONMENT)["dependencies"][-1]["pip"]
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in pip
    assert not (ROOT / "binder").exists() and not (ROOT / ".binder").exists(), "Binder would read that folder only"
