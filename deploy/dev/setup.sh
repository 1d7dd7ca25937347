#!/bin/sh
# Make this clone ready to run: system packages, then .venv from pyproject.toml's ranges under constraints.txt.
#
#     deploy/dev/setup.sh daemon      what `make demo` needs
#     deploy/dev/setup.sh dev         that, and the tools and references of `make test`
#     deploy/dev/setup.sh protos      .venv-protos: the one compiler version that writes client/hearth/v1
#     deploy/dev/setup.sh export      .venv-export: the daemon with the extra [export], whose transformers is older
#     deploy/dev/setup.sh emulator    what tests/arm64 needs of the system; no environment
#     deploy/dev/setup.sh board       what tests/board needs of the system; no environment
#     deploy/dev/setup.sh packages    what `make deb` and the tests of its packages need of the system; no environment
#
# Installs only what is missing, and asks for root only if a system package is missing. PYTHON names an interpreter,
# CC a compiler. A second run takes well under a second: a stamp in the environment names what it was made from. The
# stamp is removed before the first change and written after the last, so an environment without one was interrupted,
# and is made anew. Called by the Makefile.
set -eu

stage=${1:?"usage: deploy/dev/setup.sh daemon|dev|protos|export|emulator|board"}
constraints=constraints.txt
case $stage in
daemon | dev) venv=.venv ;;
protos) venv=.venv-protos ;;
export) venv=.venv-export constraints=constraints-export.txt ;;
emulator | board | packages) ;;
*) echo "setup: no stage \"$stage\": use daemon, dev, protos, export, emulator, board or packages" >&2 && exit 2 ;;
esac
cd -- "$(dirname -- "$0")/../.."
exec </dev/null # nothing here reads an answer, and a closed stdin would be reused as somebody's file

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# --- what is missing on this system ------------------------------------------------------------------------------

is_complete_python() {
    "$1" - 2>/dev/null <<'EOF'
import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))
EOF
}

# Sets `python` to the first interpreter that can make the environment and compile for it. /usr/bin/python3 by its path
# too: it is the one that apt completes, and another python3 may stand before it.
find_python() {
    for python in ${PYTHON:-} python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
        if is_complete_python "$python"; then return 0; fi
    done
    python=
    return 1
}

# The compiler that building an extension for this interpreter will call, which need not be `cc`.
can_compile() {
    compiler=${CC:-gcc}
    if [ -z "${CC:-}" ] && [ -n "$python" ]; then
        compiler=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "gcc")')
    fi
    # shellcheck disable=SC2086 # a command with options
    echo 'int main(void) { return 0; }' | $compiler -x c - -o /dev/null 2>/dev/null
}

missing_packages() {
    [ -n "$python" ] || echo python3-venv python3-dev
    can_compile || echo gcc libc6-dev
    # systemd-python has no wheels: it is compiled against libsystemd.
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists libsystemd 2>/dev/null || echo libsystemd-dev
    [ "$stage" = dev ] || return 0
    # The tests of the units ask systemd itself; those of the clock move it for one process.
    # What the daemon says to the network is asked of the kernel.
    command -v systemd-analyze >/dev/null || echo systemd
    command -v strace >/dev/null || echo strace
    [ -n "$(find /usr/lib /lib -name libfaketime.so.1 2>/dev/null | head -n 1)" ] || echo libfaketime
}

install_packages() {
    by_hand="as root, run: apt-get update && apt-get install $*"
    command -v apt-get >/dev/null || die "missing: what Debian calls $*; here is no apt-get, so install them otherwise"
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif ! command -v sudo >/dev/null; then
        die "system packages are missing, and this is neither root nor is there sudo; $by_hand"
    elif (: </dev/tty) 2>/dev/null; then
        as_root=sudo
    else
        as_root='sudo -n' # nobody is there to type a password
    fi
    say "installing system packages: $*"
    # shellcheck disable=SC2086 # absent, or a command with options
    {
        $as_root apt-get update -qq &&
            $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
                -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" >/dev/null
    } >&2 || die "system packages are missing and could not be installed; $by_hand"
}

ensure_system_packages() {
    find_python || true
    # shellcheck disable=SC2046 # a list
    set -- $(missing_packages)
    [ $# -gt 0 ] || return 0
    install_packages "$@"
    find_python || die "no Python >= 3.11 with venv, ensurepip and headers, even with $*:" \
        "use Debian 12 or later, or name a complete interpreter: PYTHON=/path/to/python3 make ..."
}

ensure_emulator() {
    set --
    command -v qemu-aarch64-static >/dev/null || set -- "$@" qemu-user-static
    command -v mmdebstrap >/dev/null || set -- "$@" mmdebstrap
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || set -- "$@" debian-archive-keyring
    if [ "$stage" = board ]; then
        command -v qemu-system-aarch64 >/dev/null || set -- "$@" qemu-system-arm
        [ -x /usr/sbin/mkfs.ext4 ] || set -- "$@" e2fsprogs
    fi
    if [ "$stage" = packages ]; then
        command -v dpkg-deb >/dev/null || set -- "$@" dpkg
        command -v lintian >/dev/null || set -- "$@" lintian
        command -v systemd-nspawn >/dev/null || set -- "$@" systemd-container
    fi
    [ $# -eq 0 ] || install_packages "$@"
}

# --- the environment ---------------------------------------------------------------------------------------------

# What an environment cannot outlive: its path and its interpreter's minor version are written into its scripts.
identity() {
    echo "$PWD $("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
}

contents() {
    cat pyproject.toml "$constraints" deploy/dev/setup.sh | sha256sum | cut -d ' ' -f 1
}

pip_install() {
    # Progress only where somebody watches; warnings and errors always.
    [ -t 2 ] && quiet= || quiet=--quiet
    # shellcheck disable=SC2086 # absent, or one word
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input $quiet "$@" >&2
}

mkdir -p .cache
exec 9>.cache/setup.lock
# Two runs at once would each half make one environment.
flock -n 9 || { say "waiting for another set-up of this clone to end" && flock 9; }

case $stage in emulator | board | packages)
    ensure_emulator
    exit 0
    ;;
esac

stamp=$venv/hearth-ready
had_stage='' had_identity='' had_contents=''
if [ -f "$stamp" ]; then
    { read -r had_stage && read -r had_identity && read -r had_contents; } <"$stamp" || had_stage=''
fi
[ "$had_identity" = "$(identity)" ] || had_stage=''
if [ "$had_stage" = dev ]; then stage=dev; fi # it holds all that the daemon needs: do not forget the rest
if [ "$had_stage" = "$stage" ] && [ "$had_contents" = "$(contents)" ]; then exit 0; fi

ensure_system_packages
say "installing Python packages into $venv for \"$stage\""
rm -f "$stamp"
if [ -z "$had_stage" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
# Dependency groups need pip 25.1, --build-constraint 25.3; Debian 12 brings 23.0.
pip_install -c "$constraints" pip
case $stage in
daemon) set -- -e '.[daemon]' ;;
dev) set -- -e '.[daemon]' --group test --group reference ;;
protos) set -- --group protos ;;
export) set -- -e '.[daemon,export]' ;;
esac
# The compiler of the protos is older than the run time that its output must work with: own pins, in pyproject.toml.
[ "$stage" = protos ] || set -- -c "$constraints" --build-constraint "$constraints" "$@"
pip_install "$@"
sync -f "$venv" # a power cut must not leave the stamp beside empty files
printf '%s\n' "$stage" "$(identity)" "$(contents)" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "$venv is ready"
