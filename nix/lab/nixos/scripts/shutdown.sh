#!/bin/sh
# An orderly shutdown: stops the services first, then writes everything to the disk.
export PATH=/run/current-system/sw/bin
echo "stopping services" >/dev/console
sv -w 5 force-stop /run/service/* >/dev/null 2>&1
sync
mount -o remount,ro / 2>/dev/null
sync
