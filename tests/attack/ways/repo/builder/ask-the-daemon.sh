#!/bin/sh
# says: ended ask-the-daemon
for socket in /nix/var/nix/daemon-socket/socket @VICTIM@/state/nix/client/socket /run/toto-nix*/client/socket; do
    ls -la $socket && nc -w 2 local:$socket </dev/null
done
env
echo ended ask-the-daemon
