"""Whether a server can be reached, found out at once: libraries retry for minutes where there is no network."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit

from ebt_megatron.core.errors import RecipeError

PATIENCE = 3.0  # seconds
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def require_reachable(url: str) -> None:
    """Raise RecipeError within PATIENCE where the server of a URL cannot be reached; behind a proxy it is not tried."""
    if any(os.environ.get(name) for name in _PROXIES):  # then names are not resolved here
        return
    parts, failed = urlsplit(url), [f"no answer within {PATIENCE:g} s"]

    def connect() -> None:
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), PATIENCE).close()
            failed.clear()
        except OSError as error:
            failed[0] = str(error)

    thread = threading.Thread(target=connect, daemon=True)  # resolving a name has no time limit of its own
    thread.start()
    thread.join(PATIENCE)
    if failed:
        raise RecipeError(f"{url} cannot be reached ({failed[0]})")


def require_hub() -> None:
    """Raise RecipeError at once where the Hugging Face Hub (or HF_ENDPOINT) cannot be reached, or is not to be."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise RecipeError("HF_HUB_OFFLINE is set")
    require_reachable(constants.ENDPOINT)
