#!/bin/sh
# What process 1 runs once at boot: cards, then services.
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
# Who waits for this machine waits for its ssh, so what ssh needs comes first; nix is heavy to start.
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
