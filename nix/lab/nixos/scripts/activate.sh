#!/bin/sh
# Makes /etc, users and wrappers those of @out@. Starts and stops nothing: switch-to-configuration does that.
systemConfig=@out@
export PATH=@out@/sw/bin
_status=0
umask 022

ln -sfn "$(readlink $systemConfig/usr)" /usr.new && mv -T /usr.new /usr

# /etc: every file is a link into /etc/static; one with a mode is a copy.
static=$(readlink -f $systemConfig/etc)
touch /etc/.lab-copies
ln -sfn "$static" /etc/static.new && mv -T /etc/static.new /etc/static
: > /etc/.lab-copies.new
(cd "$static" && find . ! -type d ! -name '*.mode') | sed 's|^\./||' | while read -r file; do
  case $file in */*) [ -d "/etc/${file%/*}" ] || mkdir -p "/etc/${file%/*}" ;; esac
  if [ -e "$static/$file.mode" ]; then
    read -r mode owner < "$static/$file.mode"
    echo "$file" >> /etc/.lab-copies.new
    if ! cmp -s "$static/$file" "/etc/$file" || [ -L "/etc/$file" ]; then
      cp "$static/$file" "/etc/$file.new"
      chmod "$mode" "/etc/$file.new"
      mv -f "/etc/$file.new" "/etc/$file"
    fi
  elif [ "$(readlink "/etc/$file")" != "/etc/static/$file" ]; then
    ln -sfn "/etc/static/$file" "/etc/$file.new" && mv -f -T "/etc/$file.new" "/etc/$file"
  fi
done
# What only the previous configuration had goes.
find /etc -type l | while read -r link; do
  case $(readlink "$link") in
    /etc/static/*) [ -e "$link" ] || [ -L "/etc/static/${link#/etc/}" ] || rm -f "$link" ;;
  esac
done
while read -r file; do
  grep -qxF "$file" /etc/.lab-copies.new || rm -f "/etc/$file"
done < /etc/.lab-copies
mv /etc/.lab-copies.new /etc/.lab-copies
hostname -F /etc/hostname

# Users: a user keeps the uid it was once given.
mkdir -p /var/lib/nixos
touch /var/lib/nixos/uid-map
{ printf 'root:x:0:\nwheel:x:1:'; awk '$6 ~ /(^|,)wheel(,|$)/ { printf "%s%s", s, $1; s = "," }' /etc/lab/users
  printf '\ntty:x:5:\nusers:x:100:\nnixbld:x:30000:\nnogroup:x:65534:\n'
  gid=990
  while read -r group; do
    case $group in root | wheel | tty | users | nixbld | nogroup) continue ;; esac
    printf '%s:x:%s:' "$group" $gid; gid=$((gid - 1))
    awk -v g="$group" '("," $6 ",") ~ ("," g ",") { printf "%s%s", s, $1; s = "," }' /etc/lab/users
    echo
  done < /etc/lab/groups; } > /etc/group.new
while read -r name uid group home shell extra; do
  if [ "$uid" = - ]; then
    uid=$(awk -v n="$name" '$1 == n { print $2 }' /var/lib/nixos/uid-map)
    if [ -z "$uid" ]; then
      uid=$(awk 'BEGIN { u = 999 } $2 > u { u = $2 } END { print u + 1 }' /var/lib/nixos/uid-map)
      echo "$name $uid" >> /var/lib/nixos/uid-map
    fi
  fi
  gid=$(awk -F: -v g="$group" '$1 == g { print $3 }' /etc/group.new)
  echo "$name:x:$uid:${gid:-65534}::$home:$shell" >> /etc/passwd.new
  echo "$name:*:1::::::" >> /etc/shadow.new
  case $home in
    /home/*) [ -d "$home" ] || { mkdir -p "$home"; chmod 700 "$home"; chown "$uid:${gid:-65534}" "$home"; } ;;
  esac
done < /etc/lab/users
chmod 600 /etc/shadow.new
mv /etc/group.new /etc/group; mv /etc/passwd.new /etc/passwd; mv /etc/shadow.new /etc/shadow

# The store cannot hold a setuid program, so sudo gets a copy that can be one.
if ! cmp -s $systemConfig/sw/bin/sudo /run/wrappers/bin/sudo; then
  cp -L $systemConfig/sw/bin/sudo /run/wrappers/bin/sudo.new
  chmod 4755 /run/wrappers/bin/sudo.new
  mv /run/wrappers/bin/sudo.new /run/wrappers/bin/sudo
fi

