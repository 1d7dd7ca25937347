"""A worker of the comparison that follows a script: `scripted_engine.py '{"prefill": [...], ...}'`.

For each call a list of answers, the last of which is repeated: an object is sent as it is; "die" ends the process,
"hang" answers nothing and waits to be ended. A call that the script does not name has an answer of its own.
"""

import json
import os
import signal
import sys

DEFAULTS = {
    "load": {"seconds": 0.5, "start_seconds": 1.5, "about": {"version": "scripted 1"}},
    "prefill": {"tokens": 100, "seconds": 0.5},
    "decode": {"tokens": 10, "seconds": 2.0},
    "memory": {"resident_mb": 30.0, "own_mb": 20.0, "file_mb": 10.0, "peak_mb": 40.0},
}


def main() -> None:
    script = json.loads(sys.argv[1])
    for line in sys.stdin:
        call = json.loads(line)["call"]
        if call == "quit":
            return
        answers = script.get(call) or [DEFAULTS[call]]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if answer == "hang":
            signal.pause()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
