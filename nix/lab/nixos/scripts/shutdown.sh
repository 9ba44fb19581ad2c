#!/bin/sh
# An orderly end: services first, then everything that was written reaches the disk.
export PATH=/run/current-system/sw/bin
echo "stopping services" >/dev/console
sv -w 5 force-stop /run/service/* >/dev/null 2>&1
sync
mount -o remount,ro / 2>/dev/null
sync
