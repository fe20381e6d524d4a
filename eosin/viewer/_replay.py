"""Sessions that were saved in the browser, done again without one."""

from collections.abc import Callable, Sequence
from pathlib import Path

from eosin.viewer._catalogue import Catalogue
from eosin.viewer._saved import is_same, read_session, replay_session, write_session


def replay_sessions(
    catalogue: Catalogue, sessions: Sequence[Path], out: Path, *, tell: Callable[[str], object]
) -> list[Path]:
    """Do saved sessions again, tell what comes out and write it.

    Parameters
    ----------
    catalogue : Catalogue
    sessions : sequence of Path
        JSON files of `eosin.viewer._saved.save_session`.
    out : Path
        Gets ``<session>_replayed.json``, of the same form.
    tell : callable
        Gets one sentence per session, and whether the numbers are those that were saved.

    Returns
    -------
    list of Path

    Raises
    ------
    ConfigError
        If a session does not belong to the model and the slides.
    """
    paths = []
    for session in sessions:
        saved, again = read_session(session), replay_session(catalogue, session)
        verdict = "as saved" if is_same(saved, again) else "NOT as saved"
        tell(f"{again.removed.slide_id}: {again.words} [{verdict}]")
        paths.append(out / f"{session.stem}_replayed.json")
        write_session(paths[-1], again)
    return paths
