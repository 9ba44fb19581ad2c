#!/bin/sh
# The part of systemd-run that deployment tools need: the command runs to its end in its own session, even when the
# caller (an ssh session) goes away. With --pipe or --wait the caller gets its output and status.
wait=
unit=
set_env=
with() {
  case $1 in
    *=*) set_env="$set_env $1" ;;
    *) eval "set_env=\"\$set_env $1=\${$1-}\"" ;; # a name alone: with the caller's value
  esac
}
while [ $# -gt 0 ]; do
  case $1 in
    --pipe | -P | --wait) wait=1 ;;
    --unit=*) unit=${1#--unit=} ;;
    --unit | -u) unit=$2; shift ;;
    -E | --setenv) with "$2"; shift ;;
    -E* ) with "${1#-E}" ;;
    --setenv=*) with "${1#--setenv=}" ;;
    -p | --property) shift ;;
    --) shift; break ;;
    -*) ;;
    *) break ;;
  esac
  shift
done
unit=${unit:-run-$$}
dir=/run/transient/${unit%.service}
mkdir -p /run/transient
if [ -e "$dir/pid" ] && kill -0 "$(cat "$dir/pid")" 2>/dev/null; then
  echo "Failed to start transient service unit: Unit ${unit%.service}.service was already loaded or has a fragment file." >&2
  exit 1
fi
rm -rf "$dir"
mkdir "$dir"
: > "$dir/output"
env -i PATH=/run/wrappers/bin:/run/current-system/sw/bin $set_env setsid sh -c '
  dir=$1; shift
  echo $$ > "$dir/pid"
  "$@"
  echo $? > "$dir/status.new"
  mv "$dir/status.new" "$dir/status"' sh "$dir" "$@" </dev/null >"$dir/output" 2>&1 &
[ -n "$wait" ] || exit 0
shown=0
while :; do
  # The status is read first: output that is read after it is complete.
  done=; [ -e "$dir/status" ] && done=1
  size=$(stat -c %s "$dir/output")
  if [ "$size" -gt $shown ]; then tail -c +$((shown + 1)) "$dir/output" | head -c $((size - shown)) >&2; shown=$size; fi
  [ -z "$done" ] || exit "$(cat "$dir/status")"
  sleep 0.1
done
