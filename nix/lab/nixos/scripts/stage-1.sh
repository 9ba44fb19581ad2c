#!/bin/busybox sh
# The lab's boot loader, for sandboxes and machines: it finds the system to boot, puts its store together and starts it.
# It has only a busybox and a few modules.
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /root /base /own
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null

fail() { echo "stage 1: $*" >/dev/console; sync; sleep 1; echo c > /proc/sysrq-trigger; sleep 60; }
while read -r module; do
  insmod /modules/$module.ko || echo "stage 1: cannot load $module"
done < /modules/load-order

tries=0
until [ -b /dev/vdc ]; do
  tries=$((tries + 1))
  [ $tries -lt 50 ] || fail "the disks have not appeared"
  sleep 0.1
done
mount -t ext4 -o noatime /dev/vda /root || fail "cannot mount the disk"
mount -t squashfs -o ro /dev/vdb /base || fail "cannot mount the shared image"
mount -t squashfs -o ro /dev/vdc /own || fail "cannot mount the host's image"

cd /root
mkdir -p nix/store nix/.rw/upper nix/.rw/work nix/var/nix/profiles nix/var/nix/db boot etc var/lib var/log tmp home root run proc sys dev
chmod 1777 tmp
mkdir -p nix/.ro-base nix/.ro-own
mount --move /base nix/.ro-base
mount --move /own nix/.ro-own
mount -t overlay overlay -o lowerdir=nix/.ro-own:nix/.ro-base,upperdir=nix/.rw/upper,workdir=nix/.rw/work nix/store \
  || fail "cannot put the store together"

# The boot default is what `switch-to-configuration boot|switch` wrote; a new disk boots the system of its image.
for word in $(cat /proc/cmdline); do
  case $word in init=*) given=${word#init=} ;; esac
done
system=${given%/init}
[ -s boot/default ] && system=$(cat boot/default)
[ -d "/root$system" ] || fail "$system is not in the store"

# On the first boot nix learns what is in the image, and the system becomes generation 1.
if ! [ -e nix/var/nix/db/db.sqlite ]; then
  cp nix/.ro-own/nix-db/schema nix/var/nix/db/schema
  cp nix/.ro-own/nix-db/db.sqlite nix/var/nix/db/new
  chmod 644 nix/var/nix/db/new
  mv nix/var/nix/db/new nix/var/nix/db/db.sqlite
fi
if ! [ -L nix/var/nix/profiles/system ]; then
  ln -s "$system" nix/var/nix/profiles/system-1-link
  ln -s system-1-link nix/var/nix/profiles/system
fi

# Debian's programs look for their loader, libraries and plugins below /usr.
ln -sfn "$(readlink "/root$system/usr")" usr
for link in bin sbin lib lib64; do ln -sfn usr/$link $link; done
echo "$system" > nix/.booting

mount --move /proc proc
mount --move /sys sys
mount --move /dev dev
exec switch_root /root "$system/init"
