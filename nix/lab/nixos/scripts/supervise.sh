#!/bin/sh
# The supervisor's verbs: start, stop, restart NAME…; start-all; state NAME. Each service is a runsv of its own,
# child of process 1, so that it outlives whoever asked for it.
export PATH=/run/current-system/sw/bin
run=/run/service

start() {
  service=$run/$1
  mkdir -p $service/supervise # runsv would make it for root only, and anybody may ask for a state
  rm -f $service/down-wanted /run/unit-state/$1
  cp -f /etc/sv/$1/run /etc/sv/$1/finish $service/
  if [ -e $service/supervise/ok ] && sv status $service >/dev/null 2>&1; then
    printf u > $service/supervise/control
  else
    # Nor may it keep the lock of the switch that asked.
    ( cd / && exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- && exec env -i PATH=$PATH setsid runsv $service </dev/null >/dev/console 2>&1 ) &
  fi
}
stop() {
  service=$run/$1
  [ -d $service ] || return 0
  touch $service/down-wanted
  sv -w 10 force-stop $service >/dev/null
  echo inactive > /run/unit-state/$1
}
# active, inactive, or failed and a status: what the unit's last end was.
state() {
  if [ -s /run/unit-state/$1 ]; then cat /run/unit-state/$1
  elif [ "$(cat $run/$1/supervise/stat 2>/dev/null)" = run ]; then echo active
  else echo inactive; fi
}

verb=$1
shift
case $verb in
  start | stop) for name; do $verb "$name"; done ;;
  restart) for name; do stop "$name"; start "$name"; done ;;
  state) state "$1" ;;
esac
