"""Whether the hub can be reached, found out once and quickly: its own client tries for a minute, and says so often."""

from __future__ import annotations

import os
import socket
import sys
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PATIENCE = 5  # seconds


@lru_cache(maxsize=1)
def why_offline() -> str | None:
    """Why the hub cannot be reached; None where it can. If not, the libraries are told to use what is on the disk."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("0", "", "FALSE", "NO", "OFF"):
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else address
    try:
        port = through.port or (443 if through.scheme == "https" else 80)
        socket.create_connection((through.hostname or "", port), PATIENCE).close()
    except (OSError, ValueError) as error:
        _stay_offline()
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"{through.hostname} cannot be reached: {reason}"
    return None


def by_hand(path: str, revision: str | None = None, file: str | None = None, key: str = "model.path") -> str:
    """What to run where there is a network for a model of the hub, or one file of it, and what to do with it here."""
    which = f" {file}" * (file is not None) + f" --revision {revision}" * (revision is not None)
    return f"hf download {path}{which} --local-dir DIRECTORY, on a machine that reaches it; then {key}=DIRECTORY"


def _stay_offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once by what is not imported yet
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
