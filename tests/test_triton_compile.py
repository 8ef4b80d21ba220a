"""The Triton kernels' code, compiled ahead of time for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets, so that it does not compile", allow_module_level=True)

from minipaged.attention import triton_kernels as kernels
from minipaged.kernel_report import SHAPES, TARGETS, Specialisation, compile_for, report

OPT_13B, LLAMA_8B = dict(heads=40, kv_heads=40), dict(heads=32, kv_heads=8)


@pytest.mark.parametrize("kernel", ["decode", "split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("model", [OPT_13B, LLAMA_8B], ids=["a KV head each", "four heads share one"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_decode_reads_keys_and_values_16_bytes_at_a_time_and_never_spills(kernel, dtype, head_dim, model, target):
    got = compile_for(Specialisation(kernel, target, dtype, head_dim, **model))
    assert got.spilled == 0
    assert set(got.cache_loads) == {("keys", 128), ("values", 128)}
    assert got.shared <= 48 * 1024, "at least three programs share a processor"


@pytest.mark.parametrize("kernel", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for_every_target_without_spills(kernel, target):
    got = compile_for(Specialisation(kernel, target, **LLAMA_8B))
    assert got.spilled == 0
    assert got.shared <= 64 * 1024, "what each of the targets has"
    if kernel in ("copy", "prefill"):
        assert got.widest_load == 128


@pytest.mark.parametrize("kernel, head_dim, block_size, dtype, target", [
    ("decode", 80, 13, torch.float32, "sm_80"), ("decode", 256, 256, torch.float32, "sm_90"),
    ("decode", 256, 1, torch.bfloat16, "gfx942"), ("prefill", 80, 8, torch.bfloat16, "sm_80"),
    ("prefill", 96, 16, torch.float32, "sm_90"), ("prefill", 256, 32, torch.float16, "gfx942"),
    ("write", 80, 16, torch.float32, "gfx942"), ("copy", 96, 8, torch.bfloat16, "sm_90"),
    ("reduce", 96, 16, torch.float32, "sm_80")])
def test_other_head_dims_types_and_block_sizes(kernel, head_dim, block_size, dtype, target):
    got = compile_for(Specialisation(kernel, target, dtype, head_dim, block_size=block_size))
    assert got.spilled == 0
    assert "inputPrecision = tf32" not in got.ttir, "float32 stays float32"


def test_the_report_states_bytes_and_bounds(capsys):
    text = report(targets=["sm_80"])
    decode = next(line for line in text.splitlines() if line.startswith("decode"))
    # 32 sequences of 1,024 tokens, keys and values of 40 heads of 128 in 2 bytes; queries, outputs and tables beside.
    moved = 2 * 32 * 1024 * 40 * 128 * 2 + 2 * 32 * 40 * 128 * 2 + 32 * 64 * 8
    assert Specialisation("decode", "sm_80").bytes_moved() == moved
    assert f"{moved / 1e6:.2f}" in decode and f"{moved / 2.039e12 * 1e6:.2f}" in decode
    assert "no measurement" in text and "A100 80 GB SXM" in text
    print(text)


def test_the_interpreter_is_told_from_the_compiler():
    code = ("from minipaged.kernel_report import report\nfrom minipaged.errors import InvalidConfig\n"
            "try:\n    report()\nexcept InvalidConfig as error:\n    print(error)")
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, text=True,
                         capture_output=True, check=True)
    assert "unset it" in run.stdout


def test_constants_are_those_of_the_launch():
    """The report compiles with the functions that `attend` launches with; a tile fits the smallest contexts too."""
    constants = kernels.attention_constants(40, 40, 128, torch.float16, 16, 4)
    assert constants.items() <= Specialisation("split", "sm_80").constants().items()
