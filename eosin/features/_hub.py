"""Weights from the Hugging Face hub, with one sentence for whatever stands in the way."""

from collections.abc import Sequence
from pathlib import Path

from eosin.errors import ConfigError
from eosin.features._weights import FILE_NAMES

HUB = "https://huggingface.co/"
ASK_S = 10.0


def download_weights(repository: str, *, revision: str = "", file: str = "", gated: bool = False) -> Path:
    """Return the local copy of a repository's weights, downloaded when it is not in the cache yet.

    Parameters
    ----------
    repository : str
        ``owner/name``.
    revision : str
        Commit; the newest, or what the cache has, when empty.
    file : str
        Name of the file; the usual names are tried in turn when empty.
    gated : bool
        Whether access must be asked for, for the message.

    Raises
    ------
    ConfigError
        Without connection, token, access or file; the message says where to ask and how to work offline.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    commit, names = revision or None, (file,) if file else FILE_NAMES
    cached = _cached(repository, names, commit)
    if cached is not None:
        return cached
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=commit))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # no connection, which says nothing about the name
                raise _obstacle(repository, error, gated=gated) from error
        except Exception as error:
            raise _obstacle(repository, error, gated=gated) from error
    raise _no_file(repository, names)


def require_download(repository: str, *, revision: str = "", file: str = "", gated: bool = False) -> None:
    """Ask the hub, within seconds, whether `download_weights` would get the file; arguments and errors are the same."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError

    commit, names = revision or None, (file,) if file else FILE_NAMES
    if _cached(repository, names, commit) is not None:
        return
    if gated and get_token() is None:
        raise _gated(repository, "there is no token of the hub here")
    if HF_HUB_OFFLINE:
        raise _obstacle(repository, ConnectionError("HF_HUB_OFFLINE is set"), gated=gated)
    for name in names:
        try:
            get_hf_file_metadata(hf_hub_url(repository, name, revision=commit), timeout=ASK_S)
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise _obstacle(repository, error, gated=gated) from error
        return
    raise _no_file(repository, names)


def _cached(repository: str, names: Sequence[str], commit: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name, revision=commit) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _no_file(repository: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"{HUB}{repository} has no file named {' or '.join(names)}; pass --weights FILE", code="weights")


def _offline(repository: str) -> str:
    return f"download the weights from {HUB}{repository} where that is possible and pass --weights FILE"


def _gated(repository: str, found: str) -> ConfigError:
    ask = f"ask for access at {HUB}{repository}, then run `hf auth login` or set HF_TOKEN"
    return ConfigError(
        f"the weights of {repository} are gated{f' and {found}' if found else ''}: {ask}; or {_offline(repository)}",
        code="weights",
    )


def _obstacle(repository: str, error: Exception, *, gated: bool) -> ConfigError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or (gated and status == 404):
        return _gated(repository, "")
    hint = " (access must be asked for there)" if gated else ""
    reason = type(error).__name__ if status is None else f"HTTP {status}"
    return ConfigError(
        f"the weights of {repository} cannot be fetched ({reason}); {_offline(repository)}{hint}", code="weights"
    )
