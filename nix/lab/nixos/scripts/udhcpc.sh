#!/bin/sh
# Called by udhcpc. It leaves an existing lease alone, so that a restart of the client (by a changed configuration) does
# not cut the connection that requested it.
export PATH=/run/current-system/sw/bin
case $1 in
  deconfig) ip link set "$interface" up ;;
  bound | renew)
    if ! ip addr show dev "$interface" | grep -q "inet $ip/"; then
      ip addr flush dev "$interface"
      ip addr add "$ip/$mask" dev "$interface"
      echo "$interface has the address $ip"
    fi
    for gateway in $router; do
      ip route show | grep -q "^default via $gateway dev $interface" || ip route add default via "$gateway" dev "$interface"
    done
    [ -z "$dns" ] || for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf
    ;;
esac
exit 0
