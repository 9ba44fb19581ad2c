#!/bin/sh
# says: ended fixed-neighbours
# network
cat /etc/resolv.conf /proc/net/unix /proc/net/tcp | head -40
ip addr add 127.0.0.1/32 dev uplink; ip route; iptables -F; nft flush ruleset
ls -la /proc/*/root/ | head -20
echo ended fixed-neighbours
