#!/bin/sh
# says: ended survive
setsid sleep 765432 </dev/null >/dev/null 2>&1 &
nohup sh -c 'trap "" TERM HUP INT; sleep 765432' </dev/null >/dev/null 2>&1 &
echo ended survive
