"""minipaged: the memory design of the PagedAttention paper (Kwon et al., SOSP '23), to be read and run.

    from minipaged import LLM, SamplingParams

    with LLM("tiny-opt") as llm:
        print(llm.generate("Four score and seven years ago our", SamplingParams(temperature=0)))
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from . import errors
from .chaos import Chaos
from .params import BeamSearchParams, EngineConfig, SamplingParams
from .trace import Trace

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchOutput", "BeamSearchParams", "Chaos", "CompletionOutput", "EngineConfig", "RequestOutput",
           "SamplingParams", "Trace", "errors"]

# On Linux the threads of PyTorch spin while they wait for work, by default for milliseconds: time that another process
# may need. Turns of the loop, and tokens/s of a small model on two cores, alone and beside a process that keeps a core:
# 0: 860, 950; 1,000: 1,140, 790; 10,000: 1,440, 310; 100,000 is no faster. Read when torch is imported, so said before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# These bring torch along, which takes a second; it is imported when first needed.
_LAZY = {"LLM": ".llm", "RequestOutput": ".outputs", "CompletionOutput": ".outputs", "BeamSearchOutput": ".outputs"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
