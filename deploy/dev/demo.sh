#!/bin/sh
# Start a daemon of its own, ask it one question, show the answer as it comes, stop the daemon.
#
#     deploy/dev/demo.sh STATE_DIRECTORY [QUESTION]
#
# Needs the environment and the built default model; `make demo` sees to both. Works without a terminal. Leaves nothing
# running and nothing behind, also when interrupted; exits with 0 only if the daemon answered and stopped cleanly.
set -eu
state=${1:?"usage: deploy/dev/demo.sh STATE_DIRECTORY [QUESTION]"}
question=${2:-"What is the capital of France, and what is it known for?"}
cd -- "$(dirname -- "$0")/../.."
exec </dev/null # the question is an argument; `hearth ask` would read a piped one

# A service manager's or a person's own settings are meant for another daemon than this one.
unset NOTIFY_SOCKET WATCHDOG_USEC WATCHDOG_PID LISTEN_FDS JOURNAL_STREAM INVOCATION_ID HEARTH_ADDRESS
for name in $(env | sed -n 's/^\(HEARTHD_[A-Z_]*\)=.*/\1/p'); do unset "$name"; done

run=$(mktemp -d /tmp/hearth.XXXXXX) # short: the path of a Unix socket has at most 107 bytes
daemon='' asking=''

finish() {
    code=$?
    trap '' INT TERM HUP
    trap - EXIT
    # Our own children, by their ids; each may have ended already.
    if [ -n "$asking" ]; then kill "$asking" 2>/dev/null || true; fi
    if [ -n "$daemon" ]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" || true
    fi
    if [ "$code" -ne 0 ]; then
        echo "demo: failed with exit code $code. The daemon's last lines:" >&2
        if [ -f "$run/log" ]; then tail -n 20 "$run/log" >&2; fi
    fi
    rm -rf "$run"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

cat >"$run/hearthd.toml" <<EOF
[server]
unix_socket = "$run/hearthd.sock"
tcp = []
EOF
mkfifo "$run/alive"
exec 7<>"$run/alive" # both ends, so that no opening of one end waits for the other
exec 8<"$run/alive"
printf '\n$ hearth ask "%s"\n\n' "$question"

STATE_DIRECTORY=$state .venv/bin/hearthd serve --config "$run/hearthd.toml" >"$run/log" 2>&1 8<&- &
daemon=$!
exec 7>&- # only the daemon holds the writing end now: the pipe ends when it does, however it does
# Waits until the daemon is ready, which takes a board some seconds, then streams. The likeliest words, so that everyone
# sees the same first answer.
.venv/bin/hearth ask --address "unix://$run/hearthd.sock" --wait 300 --temperature 0 --max-tokens 150 "$question" &
asking=$!
{
    cat <&8 >/dev/null
    kill "$asking" # nobody is left who could answer
} 2>/dev/null &
watcher=$!

wait "$asking" || exit 1
asking=''
kill "$watcher"

kill "$daemon"
code=0
wait "$daemon" || code=$?
daemon=''
[ "$code" -eq 0 ] || { echo "demo: hearthd answered, but stopped with exit code $code" >&2 && exit "$code"; }
printf '\ndemo: hearthd answered and stopped cleanly\n'
