#!/usr/bin/env bash
# A run on GPU nodes of a SLURM cluster: one process per node, with all of its GPUs.
#
# slurm.sh --name=NAME --nodes=4 --gpus=8 --cpus=64 --time=24:00:00 \
#   [--partition=P] [--account=A] [--qos=Q] [--program=PATH/TO/bin/rlft] \
#   [--max-restarts=100] [--grace=120] -- ppo --config=FILE --workdir=DIR
#
# --gpus, --cpus: those of one node. Called where rlft is installed, on a file system that
# the nodes share. --grace seconds before the time limit rlft gets SIGTERM, saves, exits
# 75, and the job goes back to the queue; another exit code ends it. --dry-run prints all.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' nodes='' gpus='' cpus='' time='' partition='' account='' qos='' program=rlft
max_restarts=100 grace=120
parse "name nodes gpus cpus time partition account qos program max-restarts grace" '' "$@"
need name nodes gpus cpus time
need_command
check_name name "$name"
check_number nodes "$nodes"
check_number gpus "$gpus"
check_number cpus "$cpus"
check_number grace "$grace"
check time "$time" '([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}' 24:00:00
check partition "$partition" '[A-Za-z0-9_.,-]+' gpu
check account "$account" '[A-Za-z0-9_.-]+' my-group
check qos "$qos" '[A-Za-z0-9_.-]+' normal
check max-restarts "$max_restarts" '[0-9]{1,6}' 100

run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 \
  --gpus-per-node="$gpus" --cpus-per-task="$cpus" --time="$time" \
  ${partition:+"--partition=$partition"} \
  ${account:+"--account=$account"} ${qos:+"--qos=$qos"} \
  --requeue --open-mode=append --output="$name-%j.log" --signal="B:TERM@$grace" \
  "$here/slurm.sbatch" job "$here" "$max_restarts" "$program" "${ARGS[@]}"
