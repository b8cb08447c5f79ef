"""Files of the Hugging Face hub by address: hf://owner/name/path, or hf://owner/name@revision/path."""

from __future__ import annotations

import re
from pathlib import Path

from repedit.errors import ArgumentError, HubError

# A Path has one slash where the address has two.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def local_file(path: str | Path) -> Path:
    """The path itself; for an address of the hub, the file in the cache of huggingface_hub, downloaded if it is not there.

    Raises:
        ArgumentError: if the address is not complete. HubError: if the file is not there, or the hub cannot be reached.
    """
    text = str(path)
    if not text.startswith("hf:/"):
        return Path(path)
    address = _ADDRESS.fullmatch(text)
    if address is None:
        raise ArgumentError(f"{text!r} is no file of the hub; write hf://owner/name/file.safetensors")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(address["repository"], address["file"], revision=address["revision"]))
    except Exception as error:
        raise HubError(
            f"{text} could not be downloaded: {type(error).__name__}: {str(error).strip() or 'no reason given'}; check the "
            "address, and log in with `hf auth login` if the repository is private"
        ) from error
