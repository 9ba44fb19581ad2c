#!/bin/sh
# switch-to-configuration {switch|boot|test|dry-activate}, with the exit statuses of NixOS's: 1 wrong use, 2 the
# activation failed, 4 a unit failed to start.
out=@out@
export PATH=$out/sw/bin
action=$1
case $action in
  switch | boot | test | dry-activate) ;;
  *)
    echo "Usage: $0 [switch|boot|test|dry-activate]" >&2
    exit 1
    ;;
esac
[ -e /etc/NIXOS ] || { echo "This is not a NixOS installation!" >&2; exit 1; }
# Only one runs at a time: two would undo parts of each other.
if [ "$LAB_SWITCH_LOCKED" != 1 ]; then
  mkdir -p /run/nixos
  LAB_SWITCH_LOCKED=1 exec chpst -L /run/nixos/switch-to-configuration.lock "$0" "$@"
fi

if [ $action = switch ] || [ $action = boot ]; then
  # The boot default changes in one step or not at all, even when the power fails.
  printf %s "$out" > /boot/default.new
  sync
  mv /boot/default.new /boot/default
  sync
  [ $action = switch ] || exit 0
fi

# The changes are found before anything is changed, by comparing with what runs, not with the last configuration.
stop= start= restart=
for dir in /run/service/*/; do
  [ -d "$dir" ] || continue
  name=$(basename "$dir")
  [ -e $out/etc/sv/$name/enabled ] || stop="$stop $name"
done
for file in $out/etc/sv/*/enabled; do
  [ -e "$file" ] || continue
  dir=${file%/enabled}
  name=${dir##*/}
  if ! [ -d /run/service/$name ]; then start="$start $name"
  elif ! cmp -s $dir/run /run/service/$name/run || ! cmp -s $dir/finish /run/service/$name/finish; then restart="$restart $name"
  elif [ "$(/etc/lab/supervise state $name)" != active ]; then start="$start $name"
  fi
done

if [ $action = dry-activate ]; then
  [ -z "$stop" ] || echo "would stop the following units:$stop"
  echo "would activate the configuration..."
  [ -z "$restart" ] || echo "would restart the following units:$restart"
  [ -z "$start" ] || echo "would start the following units:$start"
  exit 0
fi

status=0
if [ -n "$stop" ]; then
  echo "stopping the following units:$stop" >&2
  /etc/lab/supervise stop $stop
  for name in $stop; do sv exit /run/service/$name >/dev/null 2>&1; rm -rf /run/service/$name /run/unit-state/$name; done
fi
echo "activating the configuration..." >&2
$out/activate || status=2
if [ -n "$restart" ]; then
  echo "restarting the following units:$restart" >&2
  /etc/lab/supervise restart $restart
fi
if [ -n "$start" ]; then
  echo "starting the following units:$start" >&2
  /etc/lab/supervise start $start
fi

# A unit that ends right after its start has failed to start.
failed=
if [ -n "$start$restart" ]; then
  sleep 1.5
  for name in $start $restart; do
    case $(/etc/lab/supervise state $name) in failed*) failed="$failed $name.service" ;; esac
  done
fi
if [ -n "$failed" ]; then
  echo "warning: the following units failed:$failed" >&2
  status=4
fi
sync
exit $status
