"""Same tokens, always: the engine's tests once more with each attention backend in the place of the one chosen here.

Each backend has a pytest of its own, in which conftest.py makes it the default of `EngineConfig`. By hand:
``MINIPAGED_TEST_ATTENTION=eager pytest tests/test_engine.py``, or with ``triton`` and ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from minipaged import LLM, backends
from minipaged.backends import choose_backend
from minipaged.errors import InvalidConfig
from minipaged.memory.cache import PLAIN

TESTS = ["test_backends.py", "test_engine.py", "test_sharing.py", "test_same_tokens.py"]
# Triton's interpreter takes seconds for what the others do in milliseconds, so of these: streams, log probabilities,
# copy-on-write, swapping; test_triton_kernels.py has preemption besides.
REDUCED = ["auto_is", "papers_example", "stream_gives", "logprobs", "figure_8", "swapped_in_and_copied"]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel for this platform")
GPU, HALF = torch.device("cuda"), torch.float16  # named, not used: the choice needs none
THIS_RUN = os.environ.get("MINIPAGED_TEST_ATTENTION")


def run_with(attention: str, *options: str, **environment: str) -> None:
    """Run the engine's tests with a backend; all must pass."""
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *options,
                          *[str(here / name) for name in TESTS]], capture_output=True, text=True, timeout=2400,
                         env=os.environ | {"MINIPAGED_TEST_ATTENTION": attention} | environment, cwd=here.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)


@pytest.mark.skipif(THIS_RUN is not None, reason="this is the process that it starts")
def test_with_equation_4():
    named = "preempts_all_the_time", "attention_backends_agree"  # these name their backends themselves
    slow = "opt-125m"  # Eq. 4 in twelve layers, head by head: minutes for what the smaller geometries show as well
    run_with("eager", "-k", " and ".join(f"not {name}" for name in (*named, slow)))


@pytest.mark.skipif(THIS_RUN is not None, reason="this is the process that it starts")
@needs_triton
def test_with_triton_under_its_interpreter():
    run_with("triton", "-k", " or ".join(REDUCED), TRITON_INTERPRET="1")


@pytest.mark.skipif(THIS_RUN is None, reason="nothing is in the place of auto")
def test_auto_is_the_backend_of_this_run():
    with LLM("tiny-opt", num_gpu_blocks_override=4) as llm:
        assert llm.engine.runner.backend.name == THIS_RUN


@needs_triton
def test_a_gpu_gets_the_kernels_for_everything():
    from minipaged.attention import triton_blocks, triton_kernels

    chosen = choose_backend("auto", GPU, 128, HALF, 16)
    assert (chosen.name, chosen.reason) == ("triton", "triton: the device is a GPU")
    assert (chosen.write, chosen.attend) == (triton_blocks.reshape_and_cache, triton_kernels.attend)
    assert chosen.moves is triton_blocks.MOVES


@needs_triton
@pytest.mark.parametrize("head_dim, dtype, block_size, says", [
    (72, HALF, 16, "take head dims from 16 to 256 in steps of 16, not 72"),
    (64, torch.float64, 16, "take float16, bfloat16 and float32, not float64"),
    (64, HALF, 512, "take block sizes from 1 to 256, not 512")])
def test_what_the_kernels_do_not_take_is_refused_with_what_they_do(head_dim, dtype, block_size, says):
    with pytest.raises(InvalidConfig, match=says):
        choose_backend("triton", GPU, head_dim, dtype, block_size)
    with pytest.warns(UserWarning, match=says):  # nobody asked for them: slower, but it runs
        chosen = choose_backend("auto", GPU, head_dim, dtype, block_size)
    assert chosen.name == "torch" and chosen.moves is PLAIN and says in chosen.reason


def test_a_gpu_without_triton_goes_on_and_says_so_once(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        names = [choose_backend("auto", GPU, 64, HALF, 16).name for _ in range(3)]
    assert names == ["torch"] * 3
    assert [str(warning.message) for warning in told] == [
        "attention runs in plain PyTorch, which is slow: Triton is not to be had on this platform"]
    with pytest.raises(InvalidConfig, match="Triton is not to be had"):
        choose_backend("triton", GPU, 64, HALF, 16)
    assert choose_backend("eager", GPU, 64, HALF, 16).name == "eager"
