#!/bin/sh
# Stage 2: from a bare root to a running system. Process 1 becomes busybox's init, which runs /etc/lab/boot.
export PATH=@out@/sw/bin
exec </dev/console >/dev/console 2>&1
echo "<<< NixOS stage 2 (lab) >>>"
mount -t tmpfs -o mode=755 run /run
# (Tools take /run/systemd/system as the sign that there is systemd-run.)
mkdir -p /run/wrappers/bin /run/service /run/systemd/system /run/unit-state /run/lock /dev/pts /dev/shm /var/empty
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
[ -e /dev/stdin ] || { ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr; }
ln -sfn @out@ /run/booted-system
@out@/activate
exec /run/current-system/sw/bin/init
