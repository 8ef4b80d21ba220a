"""The Triton kernels' code, compiled ahead of time for GPUs that are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import cycle, product

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets, so that it does not compile", allow_module_level=True)

from minipaged.attention import triton_kernels as kernels
from minipaged.kernel_report import SHAPES, TARGETS, TYPES, Specialisation, compile_for, report

# Bytes that a program may ask for: on NVIDIA's cards more than the 48 KiB of static allocation, on AMD's 64 KiB.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
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


# Every type with every head dim, while block sizes and models take turns; what only copies takes each head dim once.
BLOCK_SIZES, HEAD_DIMS = (8, 16, 32, 64, 128, 256), (64, 80, 96, 128, 256)
ATTENTION = [(dtype, head_dim, BLOCK_SIZES[(i + i // 6) % 6], (OPT_13B, LLAMA_8B)[i % 2])
             for i, (dtype, head_dim) in enumerate(product(TYPES, HEAD_DIMS))]
COPYING = [(dtype, head_dim, block_size, LLAMA_8B)
           for dtype, head_dim, block_size in zip(cycle(TYPES), HEAD_DIMS, BLOCK_SIZES)]
# Bytes on the stack, at the most: the largest rows that there are, of the type that tensor cores do not take.
STACK = {("prefill", torch.float32, 256): 8}


@pytest.mark.parametrize("kernel", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for_every_target_and_spills_nothing_to_speak_of(kernel, target):
    for dtype, head_dim, block_size, model in ATTENTION if kernel in ("decode", "split", "prefill") else COPYING:
        spec = Specialisation(kernel, target, dtype, head_dim, block_size=block_size, **model)
        got = compile_for(spec)
        assert got.spilled <= STACK.get((kernel, dtype, head_dim), 0), spec
        assert got.shared <= SHARED[target], spec
        assert "inputPrecision = tf32" not in got.ttir, "float32 stays float32"
        if kernel in ("copy", "gather"):
            assert got.widest_load == 128, spec


@pytest.mark.parametrize("kernel", ["decode", "split", "prefill"])
def test_addresses_in_the_cache_have_64_bits(kernel):
    """Offsets of [positions, head's elements] from the start of a layer's keys and values."""
    offsets = re.findall(r"tt\.addptr .*tensor<16x128x!tt\.ptr<f32>>, tensor<16x128xi(\d+)>",
                         compile_for(Specialisation(kernel, "sm_90", torch.float32, 128, **OPT_13B)).ttir)
    assert len(offsets) >= 2 and set(offsets) == {"64"}


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
