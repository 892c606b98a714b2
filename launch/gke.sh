#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, through XPK or through a plain JobSet.
#
# gke.sh image  --image=REGISTRY/rlft:TAG    builds and pushes launch/Dockerfile
# gke.sh xpk    --name=NAME --image=IMAGE --cluster=C --tpu-type=v5litepod-256 \
#   [--slices=1] [--zone=ZONE] [--project=P] [--spot] -- ppo --config=FILE --workdir=DIR
# gke.sh jobset --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice \
#   --topology=16x16 [--chips=4] [--slices=1] [--spot] -- ppo --config=FILE --workdir=DIR
# gke.sh delete --name=NAME                  ends a JobSet; its pods save first
#
# Both restart the run when it exits 75 or loses a node, --max-restarts=100 times at most,
# and end on every other failure. (XPK also restarts on 42 and 127 to 255, as always.)
# --chips: those of one node. --grace=120: seconds to save in. --dry-run prints all.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' image='' cluster='' tpu_type='' zone='' project='' spot='' accelerator=''
topology='' chips=4 slices=1 max_restarts=100 grace=120

# json WORD: a JSON string, which is a YAML string too. Words have no control characters.
json() {
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  printf '"%s"' "$word"
}

# Kubernetes would expand $(NAME) in a command, whatever quotes it is in.
verbatim() { printf '%s' "${1//"\$("/"\$\$("}"; }

# The manifest: the template with its @NAMES@ filled in.
manifest() {
  local text nodes=1 size words='' word
  for size in ${topology//x/ }; do ((nodes *= size)); done
  ((nodes % chips == 0)) || die "--topology=$topology has no whole number of nodes of" \
    "--chips=$chips"
  for word in "${ARGS[@]}"; do
    words+="${words:+, }$(json "$(verbatim "$word")")"
  done
  text=$(<"$here/jobset.yaml")
  for word in name image accelerator topology chips slices max_restarts grace; do
    text=${text//"@$word@"/"${!word}"}
  done
  text=${text//'@nodes@'/"$((nodes / chips))"}
  if [[ -z $spot ]]; then text=$(sed '/# spot only$/d' <<<"$text"); fi
  # Last: what the user wrote is not searched for names.
  printf '%s\n' "${text//'@words@'/"$words"}"
}

build() {
  run docker build --file="$here/Dockerfile" --tag="$image" "${here%/*}"
  run docker push "$image"
}

submit_xpk() {
  need name image cluster tpu_type
  need_command
  # exec: XPK sends SIGTERM to the shell that it starts this in.
  run xpk workload create --workload="$name" --cluster="$cluster" \
    --tpu-type="$tpu_type" --num-slices="$slices" --docker-image="$image" \
    ${zone:+"--zone=$zone"} ${project:+"--project=$project"} ${spot:+--spot} \
    --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds="$grace" \
    --command="exec env RLFT_COORDINATOR=auto rlft $(verbatim "$(quote "${ARGS[@]}")")"
}

submit_jobset() {
  need name image accelerator topology
  need_command
  local text
  text=$(manifest)
  if ((DRY_RUN)); then
    printf 'kubectl create --filename=- <<'\''END'\''\n%s\nEND\n' "$text"
  else
    run kubectl create --filename=- <<<"$text"
  fi
}

action=${1-}
(($# == 0)) || shift
case $action in
  -h | --help) usage && exit 0 ;;
  image) parse image '' "$@" ;;
  xpk)
    parse "name image cluster tpu-type slices zone project max-restarts grace" spot "$@"
    ;;
  jobset)
    parse "name image accelerator topology chips slices max-restarts grace" spot "$@"
    ;;
  delete) parse name '' "$@" ;;
  *) die "image, xpk, jobset or delete? See --help" ;;
esac
# XPK and JobSet add to the name, and the whole may have 63 characters.
check name "$name" '[a-z]([-a-z0-9]{0,37}[a-z0-9])?' my-run
check image "$image" '[a-z0-9][a-zA-Z0-9._/:@-]*' us-docker.pkg.dev/project/images/rlft:1
check_name cluster "$cluster"
check tpu-type "$tpu_type" '[a-z0-9]+(-[a-z0-9]+)+' v5litepod-256
check_zone "$zone"
check_project "$project"
check accelerator "$accelerator" '[a-z0-9]+(-[a-z0-9]+)+' tpu-v5-lite-podslice
check topology "$topology" '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' 4x4
check_number chips "$chips"
check_number slices "$slices"
check_number grace "$grace"
check max-restarts "$max_restarts" '[0-9]{1,6}' 100

case $action in
  image)
    need image
    build
    ;;
  xpk | jobset) "submit_$action" ;;
  delete)
    need name
    run kubectl delete jobset "$name"
    ;;
esac
