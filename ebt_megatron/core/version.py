"""The version that is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Of this package; "0+unknown" of a checkout on the path that nobody installed."""
    try:
        return version("ebt-megatron")
    except PackageNotFoundError:
        return "0+unknown"
