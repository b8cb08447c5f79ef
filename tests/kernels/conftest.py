"""Kernel tests run on CUDA where there is one, and otherwise in Triton's interpreter, chosen before triton is imported."""

import os
import sys

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "triton was imported before the kernel tests could choose its interpreter: run them by themselves"
        )
    os.environ["TRITON_INTERPRET"] = "1"
