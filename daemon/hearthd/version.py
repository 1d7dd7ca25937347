"""The distribution's version. Called by `__main__` and `services`."""

from importlib import metadata

__all__ = ["daemon_version"]


def daemon_version() -> str:
    """Return the installed distribution's version; `unknown` if the package runs from a bare directory."""
    try:
        return metadata.version("hearth-chat")
    except metadata.PackageNotFoundError:
        return "unknown"
