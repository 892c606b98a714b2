# shellcheck shell=bash
# What the launchers share: options, checks, printing or running a command, and the exit
# code of a run that ended on several hosts. Sourced, never run.
# shellcheck disable=SC2034  # used by those who source it
set -euo pipefail
exec 3>&1  # what --dry-run prints, also from inside $(...)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PREEMPTED=75  # rlft saved after a signal and wants to be started again
LOST=255      # ssh lost the host; what runs there may go on
DRY_RUN=0
ARGS=()

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "error: $*"
  exit 2
}

# The comment at the top of the script that was called.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# quote WORD...: one line that any POSIX shell splits into these words again.
quote() {
  local word line='' apostrophe="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/"$apostrophe"}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# run COMMAND...: prints it under --dry-run, else shows and runs it.
run() {
  if ((DRY_RUN)); then
    printf '%s\n' "$(quote "$@")" >&3
  else
    say "+ $(quote "$@")"
    "$@"
  fi
}

# ask ASSUMED COMMAND...: what a command answers; --dry-run prints it, takes ASSUMED.
ask() {
  local assumed=$1
  shift
  run "$@" || return
  if ((DRY_RUN)); then printf '%s\n' "$assumed"; fi
}

# parse "NAME..." "FLAG..." WORD...: --NAME=VALUE into $NAME (- becomes _), --FLAG to 1,
# the words after -- into ARGS.
parse() {
  local names=" $1 " flags=" $2 dry-run " word key
  shift 2
  while (($#)); do
    word=$1
    shift
    key=${word%%=*}
    key=${key#--}
    case $word in
      --) ARGS=("$@") && break ;;
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --*=*)
        [[ $names == *" $key "* ]] || die "unknown option --$key=; it takes:$names"
        printf -v "${key//-/_}" '%s' "${word#*=}"
        ;;
      --*)
        [[ $names != *" $key "* ]] || die "--$key needs a value: --$key=VALUE"
        [[ $flags == *" $key "* ]] || die "unknown option --$key; flags:$flags"
        printf -v "${key//-/_}" 1
        ;;
      *) die "unexpected word '$word'; options are --NAME=VALUE, rlft's words follow --" ;;
    esac
  done
  for word in ${ARGS[@]+"${ARGS[@]}"}; do
    [[ $word != *[[:cntrl:]]* ]] || die "a word for rlft has a line break or a control" \
      "character: $(printf %q "$word"); put it into the config file"
  done
}

need() {
  local option # no caller's variable: a local `name` would hide theirs
  for option; do
    [[ -n ${!option} ]] || die "--${option//_/-}=... is missing; see --help"
  done
}

# Options that are given must look like what they name: they end up in command lines.
check() {
  local option=$1 value=$2 pattern=$3 example=$4
  [[ -z $value || $value =~ ^($pattern)$ ]] ||
    die "--$option=$(printf %q "$value") is not valid; an example: --$option=$example"
}

check_name() { check "$1" "$2" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' my-run; }
check_zone() { check zone "$1" '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' us-central2-b; }
check_project() { check project "$1" '[a-z0-9][a-z0-9.:-]*' my-project; }
check_number() { check "$1" "$2" '[1-9][0-9]{0,5}' 4; }

need_command() {
  ((${#ARGS[@]})) ||
    die "what shall rlft do? For example: -- ppo --config=FILE --workdir=DIR"
}

# runtime_version ACCELERATOR: the image of a TPU VM that suits jax.
runtime_version() {
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "no runtime version is known for $1; name one: --version=..." ;;
  esac
}

# verdict CODE LOG: the exit code of a run on several hosts, from the one that gcloud or
# srun gave. Both name one host's only: a host that failed would hide behind a preempted
# one. The first failure in the log is the cause; later ones are its victims.
verdict() {
  local code=$1 log=$2 cause
  cause=$(awk '
    /^launch: .* exited with [0-9]+$/ || /^srun: error: .*: Exited with exit code [0-9]+$/ {
      if ($NF != 0 && $NF != 75) { print; exit }
    }' "$log")
  if [[ -n $cause ]]; then
    say "the first to fail: $cause"
    code=${cause##* }
  fi
  printf '%s\n' "$code"
}
