#!/usr/bin/env bash
# A TPU VM of one host or of many: the same commands, sent to all of its workers.
#
# tpu_vm.sh create --name=NAME --zone=ZONE --accelerator=v5litepod-16 [--version=V] [--spot]
# tpu_vm.sh setup  --name=NAME --zone=ZONE [--ref=HEAD | --tarball=FILE] [--prepare=COMMAND]
# tpu_vm.sh run    --name=NAME --zone=ZONE -- ppo --config=FILE --workdir=DIR
# tpu_vm.sh attach | stop | delete  --name=NAME --zone=ZONE
# tpu_vm.sh fetch  --name=NAME --zone=ZONE --from=PATH --to=DIR
#
# Everywhere: --project=PROJECT, and --dry-run, which prints the commands instead.
# setup installs this checkout at a git ref (what is not committed stays here), or a
# source tarball; --prepare runs first on every worker: mount the storage of --workdir.
# run survives a lost connection: attach follows it again. stop makes rlft save and exit.
# Exit code: rlft's own; 75: preempted after saving; 255: the connection was lost.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' zone='' project='' accelerator='' version='' spot='' ref='' tarball='' prepare=''
from='' to=''

gcloud_tpu() { # gcloud_tpu VERB ARGUMENT...
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone" \
    ${project:+"--project=$project"} --quiet
}

# on_workers WORD...: on_vm.sh on every worker. Quoted here, split by the shell there.
on_workers() {
  gcloud_tpu ssh "$name" --worker=all --command="bash rlft/on_vm.sh $(quote "$@")"
}

create() {
  need accelerator
  version=${version:-$(runtime_version "$accelerator")}
  gcloud_tpu create "$name" --accelerator-type="$accelerator" --version="$version" \
    ${spot:+--spot}
}

setup() {
  local id
  [[ -z $ref || -z $tarball ]] || die "--ref and --tarball exclude each other"
  if [[ -n $tarball ]]; then
    [[ -f $tarball ]] || die "--tarball=$tarball: there is no such file"
    id=$(git hash-object "$tarball")
  else
    local root=${here%/*}
    id=$(git -C "$root" rev-parse --verify --quiet "${ref:-HEAD}^{commit}") ||
      die "--ref=${ref:-HEAD} is no commit of $root; --tarball=FILE needs no git"
    [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
      say "warning: changes that are not committed are not sent"
    tarball=${XDG_CACHE_HOME:-$HOME/.cache}/rlft-launch/rlft-$id.tar.gz
    run mkdir -p "${tarball%/*}"
    run git -C "$root" archive --format=tar.gz --prefix=rlft/ --output="$tarball" "$id"
  fi
  gcloud_tpu ssh "$name" --worker=all --command='mkdir -p rlft'
  gcloud_tpu scp "$here/on_vm.sh" "$tarball" "$name:rlft/" --worker=all
  on_workers install "$id" "rlft/${tarball##*/}" ${prepare:+"$prepare"}
}

# follow ACTION WORD...: a run's output until it ends, and its exit code.
follow() {
  if ((DRY_RUN)); then
    on_workers "$@"
    return
  fi
  local log code
  log=$(mktemp)
  # shellcheck disable=SC2064  # the path of now
  trap "rm -f '$log'" EXIT
  set +e
  on_workers "$@" 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  set -e
  # gcloud's own failures are 1 and 255; a worker's come with a line of on_vm.sh.
  if ((code == 1 || code == 255)) && ! grep -q '^launch: ' "$log"; then
    say "gcloud failed ($code) and no worker ended: the run may go on; tpu_vm.sh attach"
    exit "$LOST"
  fi
  code=$(verdict "$code" "$log")
  if ((code)); then say "the run ended with exit code $code"; fi
  exit "$code"
}

action=${1-}
(($# == 0)) || shift
case $action in
  -h | --help) usage && exit 0 ;;
  create) parse "name zone project accelerator version" spot "$@" ;;
  setup) parse "name zone project ref tarball prepare" '' "$@" ;;
  fetch) parse "name zone project from to" '' "$@" ;;
  run | attach | stop | delete) parse "name zone project" '' "$@" ;;
  *) die "create, setup, run, attach, stop, fetch or delete? See --help" ;;
esac
need name zone
check_name name "$name"
check_zone "$zone"
check_project "$project"
check accelerator "$accelerator" '[a-z0-9]+(-[a-z0-9]+)+' v5litepod-16
check version "$version" '[a-z0-9][a-z0-9.-]*' v2-alpha-tpuv5-lite

case $action in
  create | setup) "$action" ;;
  run)
    need_command
    follow run "${ARGS[@]}"
    ;;
  attach) follow attach ;;
  stop) on_workers stop ;;
  delete) gcloud_tpu delete "$name" ;;
  fetch)
    need from to
    gcloud_tpu scp --recurse "$name:$from" "$to" --worker=0
    ;;
esac
