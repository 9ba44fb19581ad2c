#!/bin/sh
# Process 1 runs this once at boot: it sets up the cards, then the services.
export PATH=/run/wrappers/bin:/run/current-system/sw/bin
ip link set lo up
while read -r mac name; do
  for card in /sys/class/net/*; do
    card=${card##*/}
    [ "$(cat /sys/class/net/$card/address)" = "$(echo "$mac" | tr A-Z a-z)" ] || continue
    ip link set "$card" down
    ip link set "$card" name "$name"
  done
done < /etc/lab/links
# toto waits for ssh on this machine, so what ssh needs starts first; nix is slow to start.
late=
for file in /etc/sv/*/enabled; do
  name=${file%/enabled}
  name=${name##*/}
  case $name in
    dhcp | sshd) /etc/lab/supervise start $name ;;
    *) late="$late $name" ;;
  esac
done
/etc/lab/supervise start $late
