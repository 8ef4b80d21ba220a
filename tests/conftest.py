"""Checkpoints that several test files use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MINIPAGED_AUDIT", "1")

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs behind & ignores it, and tests send it

from minipaged import EngineConfig
from models import make_checkpoint
from oracle import Oracle

if ATTENTION := os.environ.get("MINIPAGED_TEST_ATTENTION"):  # what "auto" is in this run; see test_backends.py
    _init = EngineConfig.__init__

    def _init_with_attention(self: EngineConfig, *args: object, **options: object) -> None:
        _init(self, *args, **{"attention": ATTENTION} | options)

    EngineConfig.__init__ = _init_with_attention


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Maps a geometry's name to a folder with such a checkpoint, made once; "tiny-opt" is the bundled model."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {"tiny-opt": "tiny-opt"}

    def get(name: str) -> str:
        if name not in made:
            made[name] = make_checkpoint(name, folder)
        return made[name]

    return get


@pytest.fixture(scope="session")
def oracle(checkpoint: Callable[[str], str]) -> Callable[[str], Oracle]:
    """Maps a geometry's name to transformers' own model on the same weights."""
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = Oracle(checkpoint(name))
        return made[name]

    return get
