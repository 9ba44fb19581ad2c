#!/bin/sh
# The supervisor's verbs: start, stop, restart NAME…; start-all; state NAME. Each service has its own runsv, a
# child of process 1, so that it outlives the caller.
export PATH=/run/current-system/sw/bin
run=/run/service

start() {
  service=$run/$1
  mkdir -p $service/supervise # runsv would make it for root only, but any user may read a state
  rm -f $service/down-wanted /run/unit-state/$1
  cp -f /etc/sv/$1/run /etc/sv/$1/finish $service/
  if [ -e $service/supervise/ok ] && sv status $service >/dev/null 2>&1; then
    printf u > $service/supervise/control
  else
    # It must not hold the lock of the switch that started it either.
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
# Prints active, inactive, or failed and the status with which the unit last ended.
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
