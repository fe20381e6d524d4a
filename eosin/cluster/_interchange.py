"""Parsl's interchange, the process between driver and workers, made to end with its driver.

The interchange of a driver that is killed would live on, and with it jobs that wait for work until their walltime.
Without an interchange the workers end after `eosin.cluster._site.LOST_S`.
"""

import os
import runpy
import sysconfig
import threading
import time
from pathlib import Path

POLL_S = 1.0


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


if __name__ == "__main__":
    os.setsid()  # a signal to the driver's group must not take what the driver ends its jobs with
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    runpy.run_path(str(Path(sysconfig.get_path("scripts")) / "interchange.py"), run_name="__main__")
