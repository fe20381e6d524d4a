"""Weights from the Hugging Face hub, with one sentence for whatever stands in the way."""

from pathlib import Path

from eosin.errors import ConfigError
from eosin.features._weights import FILE_NAMES

HUB = "https://huggingface.co/"


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
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    commit, names = revision or None, (file,) if file else FILE_NAMES
    for name in names:
        cached = try_to_load_from_cache(repository, name, revision=commit)
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=commit))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # no connection, which says nothing about the name
                raise _obstacle(repository, error, gated=gated) from error
        except Exception as error:
            raise _obstacle(repository, error, gated=gated) from error
    raise ConfigError(f"{HUB}{repository} has no file named {' or '.join(names)}; pass --weights FILE", code="weights")


def _obstacle(repository: str, error: Exception, *, gated: bool) -> ConfigError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    offline = f"download the weights from {HUB}{repository} where that is possible and pass --weights FILE"
    if status in (401, 403) or (gated and status == 404):
        ask = f"ask for access at {HUB}{repository}, then run `hf auth login` or set HF_TOKEN"
        return ConfigError(f"the weights of {repository} are gated: {ask}; or {offline}", code="weights")
    hint = " (access must be asked for there)" if gated else ""
    reason = type(error).__name__ if status is None else f"HTTP {status}"
    return ConfigError(f"the weights of {repository} cannot be fetched ({reason}); {offline}{hint}", code="weights")
