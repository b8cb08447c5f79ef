"""Shared set-up: shape-checked imports, one thread, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("repedit", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
