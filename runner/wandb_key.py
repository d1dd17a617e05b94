"""Whether Weights & Biases can be reached with a key, without importing wandb."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse


def has_key() -> bool:
    """Whether an API key is in ``WANDB_API_KEY`` or in the netrc file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    path = os.environ.get("NETRC") or next(
        (str(p) for p in (Path.home() / ".netrc", Path.home() / "_netrc") if p.is_file()), None
    )
    try:
        return path is not None and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_offline() -> bool:
    """Offline if ``WANDB_MODE`` says so, or if it says nothing and there is no key."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    return mode in {"offline", "dryrun", "disabled"} or (mode != "online" and not has_key())
