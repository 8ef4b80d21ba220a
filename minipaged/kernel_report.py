"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, load widths.

`triton.compile` takes a target instead of the GPU at hand, and the disassembler comes in Triton's own wheel. What
can be read from the code is reported; what only a GPU can show, a time, is not: the bound is arithmetic, the bytes
that a kernel must move divided by the card's nominal bandwidth.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .attention import triton_blocks, triton_kernels as kernels
from .display import text_table
from .errors import InvalidConfig

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
# Card, memory bandwidth in bytes per second, multiprocessors, as the makers state them: NVIDIA's A100 and H100 data
# sheets and architecture white papers (SXM, 80 GB), AMD Instinct MI300X data sheet. None was measured here.
CARDS = {"sm_80": ("A100 80 GB SXM", 2.039e12, 108), "sm_90": ("H100 80 GB SXM", 3.35e12, 132),
         "gfx942": ("MI300X", 5.3e12, 304)}
KERNELS = {"write": triton_blocks.write_kernel, "decode": kernels.decode_kernel, "split": kernels.decode_kernel,
           "reduce": kernels.reduce_kernel, "prefill": kernels.prefill_kernel, "copy": triton_blocks.move_kernel,
           "gather": triton_blocks.move_kernel}
# Sequences and tokens of each that the bytes are stated for; "copy" and "gather" move that many blocks in 40 layers.
SHAPES = {"write": (32, 1), "decode": (32, 1024), "split": (1, 16384), "reduce": (1, 16384), "prefill": (4, 1024),
          "copy": (8, 1), "gather": (16, 1)}
LAYERS = 40
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CACHE_READ = re.compile(r"tl\.load\((keys|values) \+")


@dataclass(frozen=True)
class Specialisation:
    """One kernel as it is compiled for a model, a block size and a target of `TARGETS`."""

    kernel: str
    target: str
    dtype: torch.dtype = torch.float16
    head_dim: int = 128
    heads: int = 40
    kv_heads: int = 40
    block_size: int = 16

    @property
    def parts(self) -> int:
        """Parts of a context in the shape of `SHAPES`, as the launch would choose them for the card."""
        if self.kernel == "decode":
            return 1
        sequences, tokens = SHAPES[self.kernel]
        return kernels.parts_of(sequences * self.kv_heads, tokens, CARDS[self.target][2])

    def constants(self) -> dict[str, object]:
        """What the launch passes as constants, warps and stages among them."""
        if self.kernel in ("write", "copy", "gather"):
            width = self.kv_heads * self.head_dim
            return triton_blocks.copy_constants(width if self.kernel == "write" else width * self.block_size)
        parts = None if self.kernel == "prefill" else self.parts
        shape = self.heads, self.kv_heads, self.head_dim, self.dtype, self.block_size
        constants = kernels.attention_constants(*shape, parts)
        if self.kernel == "reduce":
            return dict(HEADS=self.heads, HEAD_DIM=self.head_dim, PARTS=parts, D=constants["D"])
        return constants

    def bytes_moved(self) -> int:
        """Bytes that any kernel must read and write for the shape of `SHAPES`, each once."""
        sequences, tokens = SHAPES[self.kernel]
        item, all_tokens = self.dtype.itemsize, sequences * tokens
        kv = 2 * all_tokens * self.kv_heads * self.head_dim * item
        q = self.heads * self.head_dim * item  # of one token; its output is as large
        parts = sequences * self.heads * self.parts * (self.head_dim + 2) * 4
        table = 8 * sequences * triton.cdiv(tokens, self.block_size)
        blocks = 2 * kv * self.block_size * LAYERS
        return {"write": 2 * kv + 8 * all_tokens, "copy": blocks, "gather": blocks,
                "decode": kv + 2 * q * sequences + table, "split": kv + q * sequences + table + parts,
                "reduce": parts + q * sequences, "prefill": kv + 2 * q * all_tokens + table}[self.kernel]


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave.

    Attributes
    ----------
    registers : int
        Per thread.
    spilled : int
        Bytes per thread that did not fit the registers and go through memory.
    shared : int
        Bytes of shared memory per program.
    widest_load : int
        Bits that the widest load from global memory takes per thread; 128 is all that there is.
    cache_loads : tuple[tuple[str, int], ...]
        Of each load that the attention kernels make from the cache: ``"keys"`` or ``"values"``, and its bits.
    ttir : str
        Triton's intermediate code.
    """

    registers: int
    spilled: int
    shared: int
    widest_load: int
    cache_loads: tuple[tuple[str, int], ...]
    ttir: str


@lru_cache(maxsize=None)
def compile_for(spec: Specialisation) -> Compiled:
    """Compile ahead of time and read the result; kept for the life of the process.

    Raises `InvalidConfig` where Triton interprets: there is nothing to compile then.
    """
    kernel = KERNELS[spec.kernel]
    if not isinstance(kernel, triton.JITFunction):
        raise InvalidConfig("TRITON_INTERPRET=1 is set, so that Triton does not compile; unset it and start again")
    constants = spec.constants()
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature = {name: _type(name, spec.dtype) for name in kernel.arg_names}
    for name in kernel.arg_names:
        unused = name == "rows" or name.startswith("part_") and spec.kernel == "decode"
        if name in constants or unused:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
    # What a launch finds out about its arguments: torch's tensors start at multiples of 16 bytes, and so do blocks.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*") or name in ("source_stride", "target_stride")}
    result = triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGETS[spec.target],
                            options=options | dict(enable_fp_fusion=True))  # as a launch does
    read = _read_nvidia if TARGETS[spec.target].backend == "cuda" else _read_amd
    registers, spilled, loads = read(result.asm)
    from_cache = tuple((_cache_reads()[line], bits) for line, bits in loads if line in _cache_reads())
    return Compiled(registers, spilled, result.metadata.shared, max(bits for _, bits in loads), from_cache,
                    str(result.asm["ttir"]))


def _type(name: str, dtype: torch.dtype) -> str:
    if name in ("query", "key", "value", "keys", "values", "output", "source", "target"):
        return "*" + TYPES[dtype]
    return {"scale": "fp32", "table_stride": "i32", "source_stride": "i64", "target_stride": "i64"}.get(
        name, "*fp32" if name.startswith("part_") else "*i64")


@lru_cache(maxsize=None)
def _cache_reads() -> dict[int, str]:
    """The lines of the source that read the cache, and what they read; the compiler notes the line of each load."""
    lines = Path(kernels.__file__).read_text().splitlines()
    return {number: read[1] for number, line in enumerate(lines, 1) if (read := CACHE_READ.search(line))}


def _read_nvidia(asm: dict[str, bytes]) -> tuple[int, int, list[tuple[int, int]]]:
    """Registers, spilled bytes, and (source line, bits) of each load from global memory."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / command[0], *command[1:], file.name], check=True, text=True,
                                      capture_output=True).stdout
                       for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-g")))
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = _loads(code, r'//## File ".*triton_kernels\.py", line (\d+)', r"\b(?:LDG|LDGSTS)\.E(\S*)",
                   lambda suffix: int(next(iter(re.findall(r"\.(64|128)\b", suffix)), 32)))
    return used["REG"], used["STACK"] + used["LOCAL"], loads


def _read_amd(asm: dict[str, str]) -> tuple[int, int, list[tuple[int, int]]]:
    """The same; of the registers, the vector ones."""
    code = asm["amdgcn"]
    vector, scratch = (int(re.search(rf"\.{name}:\s+(\d+)", code)[1])
                       for name in ("vgpr_count", "private_segment_fixed_size"))
    loads = _loads(code, r"\.loc\s+\d+ (\d+) .*triton_kernels\.py", r"\b(?:global|buffer)_load_(\w+)",
                   lambda kind: 32 * int(kind[-1]) if "x" in kind else 32)
    return vector, scratch, loads


def _loads(code: str, line_marker: str, load: str, bits: Callable[[str], int]) -> list[tuple[int, int]]:
    line, found = 0, []
    for text in code.splitlines():
        if marker := re.search(line_marker, text):
            line = int(marker[1])
        elif instruction := re.search(load, text):
            found.append((line, bits(instruction[1])))
    return found


def report(dtype: torch.dtype = torch.float16, head_dim: int = 128, heads: int = 40, kv_heads: int = 40,
           block_size: int = 16, targets: Iterable[str] = TARGETS) -> str:
    """One line per kernel and target: what was compiled, the bytes of the stated shape, and the bound they give.

    The defaults are OPT-13B's layer.
    """
    rows = []
    for kernel, (sequences, tokens) in SHAPES.items():
        for target in targets:
            spec = Specialisation(kernel, target, dtype, head_dim, heads, kv_heads, block_size)
            got, moved = compile_for(spec), spec.bytes_moved()
            shape = f"{sequences} blocks" if kernel in ("copy", "gather") else f"{sequences} x {tokens}"
            rows.append((kernel, target, got.registers, got.spilled, got.shared, got.widest_load, shape,
                         round(moved / 1e6, 2), round(1e6 * moved / CARDS[target][1], 2)))
    header = ("kernel", "target", "registers", "spilled", "shared", "widest load", "shape", "MB", "bound us")
    cards = ", ".join(f"{CARDS[t][0]} ({t}) {CARDS[t][1] / 1e9:,.0f} GB/s" for t in targets)
    return "\n".join([
        text_table(header, rows, f"{TYPES[dtype]}, {heads} heads of {head_dim}, {kv_heads} KV heads, blocks of "
                                 f"{block_size}"), "",
        "Registers and spilled bytes are per thread, shared bytes per program, loads in bits.",
        f"Shape: sequences x tokens of each, in one layer; copy and gather: blocks in {LAYERS} layers.",
        "The bound is no measurement: MB, each byte moved once, divided by the bandwidth that the data sheets name:",
        f"{cards}.",
        "What comes from memory, not from a cache, takes at least that; prefill takes longer, bound by arithmetic."])
