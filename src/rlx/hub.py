"""The Hugging Face hub: asked first whether it can be reached, as its client tries for long."""

from __future__ import annotations

import socket
import textwrap
import urllib.parse
import urllib.request

from rlx.errors import ConfigError


def check_hub(path: str, what: str = "model") -> None:
    """Raise ConfigError where a model, or `what` it is, can only be on the hub and the hub cannot be reached."""
    import huggingface_hub
    from huggingface_hub import constants

    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ConfigError(f"there is no folder {path}; the path of a {what} is a folder, or a hub id as in org/name.")
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(path, "config.json"), str):
            return
    except ValueError as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(f"{path!r} is neither a folder nor a hub id: {reason}") from error
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        if not urllib.request.getproxies():  # through a proxy, names are the proxy's to look up
            socket.getaddrinfo(host, 443)
    except OSError as error:
        raise ConfigError(
            f"there is no folder {path}, no such {what} was downloaded before, and {host} cannot be asked for it "
            f"({error}): give the folder of a {what}, or go online."
        ) from error
