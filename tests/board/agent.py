"""Runs commands inside the board for the harness outside, one at a time, over a virtio-serial port.

A serial console would mix the kernel's lines into the output, and a network shell would be gone with the network. A
request is a line of JSON: `command` (for bash, as a person types it), `user` and `seconds`. The answer is a line too:
`exit_code` (null: out of time, and killed) and `output`, which is standard output and standard error as they came.

Runs on the board's own Python, with nothing else installed; `image` puts it there. Knows nothing of Hearth.
"""

import json
import os
import pwd
import signal
import subprocess

PORT = "/dev/virtio-ports/hearth.board"


def run(command: str, user: str, seconds: float) -> dict[str, object]:
    """Run a command in a login shell of `user`'s, though in no session: systemd would make one for each command."""
    entry = pwd.getpwnam(user)
    with subprocess.Popen(
        ["/bin/bash", "--login", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=entry.pw_dir,
        env={"HOME": entry.pw_dir, "USER": user, "LOGNAME": user, "LANG": "C.UTF-8", "TERM": "dumb"},
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=os.getgrouplist(user, entry.pw_gid),
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            exit_code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            exit_code = None
    return {"exit_code": exit_code, "output": output.decode("utf-8", "replace")}


def main() -> None:
    """Serve until the board goes down."""
    with open(PORT, "r+b", buffering=0) as port:
        while line := port.readline():
            answer = json.dumps(run(**json.loads(line))).encode() + b"\n"
            while answer:
                answer = answer[port.write(answer) :]


if __name__ == "__main__":
    main()
