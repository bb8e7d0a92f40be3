"""Stands in for `draftplus train` where a test is about the processes: each seed behaves in a way of its own."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from draftplus.launcher import end_with_launcher

end_with_launcher()
settings = dict(argument.split("=", 1) for argument in sys.argv[2:])
run = Path(json.loads(settings["output_dir"])) / settings["name"]
run.mkdir(exist_ok=True)
with (run / "started").open("a") as file:
    file.write(f"{time.time()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {os.environ.get('RANK', '')}\n")
how = settings["seed"]
if how == "1" and not (run / "mended").exists():
    print("draftplus: reward 'x' is not finite; look at it", file=sys.stderr)
    sys.exit(2)
if how == "2":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "3" and not (run / "saved").exists():

    def leave(*_: object) -> None:
        (run / "saved").touch()
        sys.exit(1)

    signal.signal(signal.SIGTERM, leave)
    (run / "waiting").touch()
    time.sleep(60)
if how == "4":
    sys.exit(1)
if how == "8" and not (run / "mended").exists():
    sys.exit(0)
time.sleep(0.2)
(run / "adapter").mkdir(exist_ok=True)
(run / "ended").write_text(str(time.time()))
