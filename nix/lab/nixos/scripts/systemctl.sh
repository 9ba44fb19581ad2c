#!/bin/sh
# The verbs of systemctl that scripts and people use on a machine of the lab.
quiet=
args=
for word; do
  case $word in
    -q | --quiet) quiet=1 ;;
    --failed | --state=failed*) args="$args --failed" ;;
    -*) ;;
    *) args="$args ${word%.service}" ;;
  esac
done
set -- $args
verb=${1:-list-units}
[ $# = 0 ] || shift
say() { [ -n "$quiet" ] || echo "$*"; }
all() { for dir in /run/service/*/; do basename "$dir"; done; }
failures() { for name in $(all); do case $(/etc/lab/supervise state "$name") in failed*) echo "$name" ;; esac; done; }
# Whether a unit of systemd-run runs: a new one has no process yet, and no status.
transient() {
  dir=/run/transient/$1
  [ -d "$dir" ] && [ ! -e "$dir/status" ] && [ -d "/proc/$(cat "$dir/pid" 2>/dev/null)" ]
}
case $verb in
  is-active)
    worst=0
    for name; do
      if transient "$name"; then state=active; else state=$(/etc/lab/supervise state "$name"); fi
      say "${state%% *}"
      [ "$state" = active ] || worst=3
    done
    exit $worst ;;
  is-failed)
    state=$(/etc/lab/supervise state "$1")
    say "${state%% *}"
    case $state in failed*) exit 0 ;; *) exit 1 ;; esac ;;
  is-system-running)
    if [ -n "$(failures)" ]; then say degraded; exit 1; fi
    say running ;;
  start | stop | restart) exec /etc/lab/supervise "$verb" "$@" ;;
  reload) for name; do sv hup /run/service/"$name" >/dev/null; done ;;
  status)
    state=$(/etc/lab/supervise state "$1")
    echo "$1.service: $state"
    [ "$state" = active ] || exit 3 ;;
  list-units | --failed)
    if [ "$verb" = --failed ] || [ "$1" = --failed ]; then
      for name in $(failures); do echo "$name.service $(/etc/lab/supervise state "$name")"; done
    else
      for name in $(all); do echo "$name.service $(/etc/lab/supervise state "$name")"; done
    fi ;;
  reboot | poweroff | halt) exec /run/current-system/sw/bin/"$verb" ;;
  daemon-reload | reset-failed | enable | disable) ;;
  *) echo "systemctl of the lab: unknown verb $verb" >&2; exit 1 ;;
esac
