#!/bin/sh
# The supervisor's verbs: start, stop, restart NAME…; start-all; state NAME. Each service is a runsv of its own,
# child of process 1, so that it outlives whoever asked for it.
export PATH=/run/current-system/sw/bin
run=/run/service

start() {
  service=$run/$1
  mkdir -p $service
  rm -f $service/down-wanted /run/unit-state/$1
  cp /etc/sv/$1/run $service/run.new && mv $service/run.new $service/run
  cp /etc/sv/$1/finish $service/finish.new && mv $service/finish.new $service/finish
  cp "$(readlink -f /etc/systemd/system/$1.service)" $service/unit
  if sv status $service >/dev/null 2>&1; then
    printf u > $service/supervise/control
  else
    ( cd / && exec env -i PATH=$PATH setsid runsv $service </dev/null >/dev/console 2>&1 ) &
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
  elif sv status $run/$1 2>/dev/null | grep -q '^run:'; then echo active
  else echo inactive; fi
}

verb=$1
shift
case $verb in
  start | stop) for name; do $verb "$name"; done ;;
  restart) for name; do stop "$name"; start "$name"; done ;;
  start-all) for file in /etc/sv/*/enabled; do [ -e "$file" ] || continue; name=${file%/enabled}; start "${name##*/}"; done ;;
  state) state "$1" ;;
esac
