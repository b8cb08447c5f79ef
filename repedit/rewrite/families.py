"""The family of a checkpoint on disk, from its config alone."""

from __future__ import annotations

from pathlib import Path

from repedit.arch import Architecture, resolve
from repedit.errors import QuantizedModel, UnknownArchitecture
from repedit.io.text import read_json


def architecture_of(directory: Path) -> Architecture:
    """The family row of a checkpoint directory.

    Raises:
        QuantizedModel, UnknownArchitecture: if it cannot be edited.
    """
    from transformers import AutoConfig

    raw = read_json(directory / "config.json", finite=False)
    quantizer = raw.get("quantization_config")
    if quantizer:
        raise QuantizedModel(
            f"{directory} is quantised ({quantizer.get('quant_method', 'unknown')}) and cannot be edited exactly; export from the "
            "unquantised base. Measuring works"
        )
    try:
        return resolve(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    except ValueError as error:
        raise UnknownArchitecture(f"the config of {directory} cannot be used: {error}") from error
