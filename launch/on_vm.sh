#!/usr/bin/env bash
# What the launchers run on a TPU VM; `tpu_vm.sh setup` copies it there.
#
# on_vm.sh install ID TARBALL [COMMAND]  COMMAND, then rlft from the tarball, once per ID
# on_vm.sh run ARGUMENT...               rlft, detached; follows it, exits with its code
# on_vm.sh attach                        follows the run of before
# on_vm.sh stop                          SIGTERM: rlft saves and exits 75
#
# The run does not hang on the connection. `run` of what runs already attaches: gcloud
# repeats a command when ssh loses the host, and a second rlft would want the same TPU.
set -euo pipefail

home=${RLFT_HOME:-$HOME/rlft}
program=${RLFT_PROGRAM:-$home/venv/bin/rlft}
mkdir -p "$home/src"

die() {
  printf 'launch: %s: error: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

# The supervisor and the run hold the lock as long as one of them lives.
alive() { ! flock --nonblock "$home/lock" true; }

install() {
  local id=$1 tarball=$2 prepare=${3-}
  if [[ -n $prepare ]]; then bash -c "$prepare"; fi
  if [[ -f $home/installed && $(<"$home/installed") == "$id" ]]; then return; fi
  if alive; then die "a run is alive here; stop it before another version is installed"; fi
  rm -rf "$home/src" "$home/venv" "$home/installed"
  mkdir -p "$home/src"
  tar -xzf "$tarball" -C "$home/src" --strip-components=1
  # TPU images come with Python 3.10. Newer images guard pip; --user leaves theirs alone.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null ||
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  uv venv --quiet --python 3.12 "$home/venv"
  uv pip install --quiet --python "$home/venv/bin/python" "$home/src[tpu]"
  printf '%s' "$id" >"$home/installed"
}

supervise() { # supervise FILE ARGUMENT...: makes FILE once the run can be followed
  local ready=$1
  shift
  exec 9>"$home/lock"
  flock --timeout 5 9 # `alive` holds it for a moment
  # A shutdown signals everyone: we outlive the run. Not '', which children inherit.
  local signalled
  trap signalled=1 TERM
  rm -f "$home/exit"
  if [[ -f $home/log ]]; then mv "$home/log" "$home/log.old"; fi
  printf '%s\n' "$@" >"$home/command"
  cd "$home/src"
  RLFT_COORDINATOR=auto "$program" "$@" >"$home/log" 2>&1 </dev/null &
  local child=$! code=127 status
  printf '%s\n' "$child" >"$home/pid"
  printf '%s\n' "$$" >"$home/supervisor"
  : >"$ready"
  while # a signal ends `wait` early, with a code of its own
    signalled=0 status=0
    wait "$child" || status=$?
    ((status == 127)) || code=$status
    ((signalled))
  do :; done
  printf '%s\n' "$code" >"$home/exit.new"
  mv "$home/exit.new" "$home/exit"
}

start() {
  local ready=$home/ready
  exec 8>"$home/starting" # one start at a time
  flock 8
  if alive; then
    [[ $(<"$home/command") == "$(printf '%s\n' "$@")" ]] ||
      die "another run is alive here; attach to it or stop it first"
  else
    rm -f "$ready"
    setsid bash "$0" supervise "$ready" "$@" >/dev/null 2>&1 </dev/null 8>&- &
    while [[ ! -e $ready ]]; do
      kill -0 $! 2>/dev/null || [[ -e $ready ]] || die "the run could not be started"
      sleep 0.1
    done
  fi
  exec 8>&-
}

attach() {
  [[ -s $home/supervisor ]] || die "nothing was ever run here"
  if alive; then
    tail --lines=+1 --sleep-interval=0.2 --pid="$(<"$home/supervisor")" -f "$home/log"
  else
    cat "$home/log"
  fi
  local code=1 # no file: killed before it could write one
  if [[ -f $home/exit ]]; then code=$(<"$home/exit"); fi
  if ((code)); then printf 'launch: %s exited with %d\n' "$(hostname)" "$code" >&2; fi
  return "$code"
}

action=${1-}
shift || die "install, run, attach or stop?"
case $action in
  install | supervise | attach) "$action" "$@" ;;
  run)
    start "$@"
    attach
    ;;
  stop) if alive; then kill -TERM "$(<"$home/pid")"; fi ;;
  *) die "unknown action '$action'" ;;
esac
