#!/usr/bin/env bash
# A run on spot TPUs that ends when it is done: asks for the TPU through a queued resource,
# installs, runs, and starts again whatever was preempted.
#
# queued.sh --name=NAME --zone=ZONE --accelerator=v5litepod-16 [--version=V] \
#   [--project=P] [--ref=HEAD | --tarball=FILE] [--prepare=COMMAND] [--on-demand] \
#   [--max-restarts=100] [--poll=30] -- ppo --config=FILE --workdir=DIR
#
# --workdir must outlive the TPU: storage that --prepare mounts on every worker.
# Exit 75 of rlft (saved after a signal), a TPU that is gone and a lost connection start
# it again; every other exit code stops the loop and is passed on. The TPU is left as it
# is then, to look at: `queued.sh --name=NAME --zone=ZONE --delete` gives it back.
# Called again, it finds its TPU and attaches to the run. --dry-run prints the commands
# of a run that nothing interrupts. --poll: seconds between two looks at the queue.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' zone='' project='' accelerator='' version='' ref='' tarball='' prepare=''
on_demand='' max_restarts=100 poll=30 delete=''
parse "name zone project accelerator version ref tarball prepare max-restarts poll" \
  "on-demand delete" "$@"
need name zone
check_name name "$name"
check_zone "$zone"
check_project "$project"
check accelerator "$accelerator" '[a-z0-9]+(-[a-z0-9]+)+' v5litepod-16
check version "$version" '[a-z0-9][a-z0-9.-]*' v2-alpha-tpuv5-lite
check max-restarts "$max_restarts" '[0-9]{1,6}' 100
check poll "$poll" '[0-9]{1,6}' 30

place=(--zone="$zone" ${project:+"--project=$project"})

tpu_vm() { # tpu_vm ACTION WORD...
  local action=$1 dry=''
  shift
  if ((DRY_RUN)); then dry=--dry-run; fi
  "$here/tpu_vm.sh" "$action" --name="$name" "${place[@]}" ${dry:+"$dry"} "$@"
}

# The queue's word for our TPU; empty when it has none. `list`, as a failing `describe`
# cannot tell a TPU that is gone from a network that is down.
state() {
  local tries
  for ((tries = 1; tries <= 10; tries++)); do
    ask "$1" gcloud compute tpus queued-resources list "${place[@]}" \
      --filter="name~/queuedResources/$name\$" --format='value(state.state)' && return
    sleep "$poll"
  done
  die "gcloud could not list the queued resources, ten times in a row"
}

give_back() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Asks for the TPU if there is none, and waits until it is ours.
acquire() {
  local now
  now=$(state '')
  while [[ $now != ACTIVE ]]; do
    case $now in
      SUSPENDING | DELETING | CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES)
        say "the queued resource is $now"
        sleep "$poll"
        ;;
      SUSPENDED | FAILED) give_back ;;
      '')
        run gcloud compute tpus queued-resources create "$name" "${place[@]}" \
          --node-id="$name" --accelerator-type="$accelerator" \
          --runtime-version="$version" ${spot:+"$spot"} --quiet
        ;;
      *) die "the queued resource $name is in state '$now', which needs a person" ;;
    esac
    now=$(state ACTIVE)
  done
}

if [[ -n $delete ]]; then
  give_back
  exit
fi
need accelerator
version=${version:-$(runtime_version "$accelerator")}
need_command
spot=--spot
if [[ -n $on_demand ]]; then spot=''; fi

for ((restarts = 0; ; restarts++)); do
  acquire
  code=0
  tpu_vm setup ${ref:+"--ref=$ref"} ${tarball:+"--tarball=$tarball"} \
    ${prepare:+"--prepare=$prepare"} || code=$?
  if ((code == 0)); then
    tpu_vm run -- "${ARGS[@]}" || code=$?
  elif ((code == 2)); then
    exit 2 # a mistake in our options: nothing to wait for
  fi
  if ((code == 0)); then exit 0; fi
  # The queue learns of a preemption a little after the hosts do.
  sleep "$poll"
  case $code in
    "$PREEMPTED" | "$LOST") why="exit code $code" ;;
    *)
      now=$(state ACTIVE)
      if [[ $now == ACTIVE ]]; then
        say "exit code $code, and the TPU is there: not started again. Its log:" \
          "tpu_vm.sh attach --name=$name --zone=$zone"
        exit "$code"
      fi
      why="exit code $code, and the TPU is ${now:-gone}"
      ;;
  esac
  if ((restarts == max_restarts)); then
    say "$why; given up after $restarts restarts"
    exit "$code"
  fi
  say "$why: start $((restarts + 2))"
done
