"""Exported folders on the Hub, or on a server that speaks its language (HF_ENDPOINT)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ebt_megatron.checkpoint.exported import is_exported, read_config
from ebt_megatron.core.errors import RecipeError
from ebt_megatron.core.network import PATIENCE, require_hub

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def hub() -> Any:
    """The huggingface_hub module, or RecipeError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise RecipeError("the Hub needs huggingface_hub: pip install 'ebt-megatron[hf]'") from None
    return huggingface_hub


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder that is meant by a path, or by a name USER/MODEL on the Hub, which is downloaded (once).

    Raises:
        RecipeError: where there is neither, in one line.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not _NAME.fullmatch(str(name)) or str(name).startswith((".", "runs/")):
        raise RecipeError(f"{name}: no such folder; give a run, an exported folder, or USER/MODEL on the Hub")
    module = hub()
    try:
        return Path(module.snapshot_download(str(name), revision=revision, local_files_only=True))
    except (module.errors.LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        require_hub()
    except RecipeError as error:
        raise RecipeError(f"{name}: no such folder here, and {error}: give a folder, or connect") from None
    try:
        return Path(module.snapshot_download(str(name), revision=revision, etag_timeout=PATIENCE))
    except Exception as error:  # the library has many, of its own and of its transports
        raise RecipeError(f"{name}: no such folder here, and {_first_line(error)}") from None


def push_to_hub(folder: str | Path, name: str, private: bool = True, token: str | None = None) -> str:
    """Upload an exported folder.

    Args:
        folder: of `ebt-convert export`.
        name: USER/MODEL.
        private: whether others may not see it.
        token: of the user; default: the one that `hf auth login` keeps.

    Returns:
        Where it is.

    Raises:
        RecipeError: where the folder is none, or the server refuses.
    """
    folder = Path(folder).expanduser()
    if not is_exported(folder):
        raise RecipeError(f"{folder} is not an exported model: ebt-convert export RUN FOLDER first")
    read_config(folder)
    module = hub()
    require_hub()
    api = module.HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Model exported by EBT-Megatron")
    except Exception as error:
        raise RecipeError(f"{name} was not uploaded: {_first_line(error)}") from None
    return f"{module.constants.ENDPOINT}/{name}"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
