#!/bin/sh
# Sets /etc, users and wrappers to those of @out@. It starts and stops nothing: switch-to-configuration does that.
systemConfig=@out@
export PATH=@out@/sw/bin
_status=0
umask 022

ln -sfn "$(readlink $systemConfig/usr)" /usr.new && mv -T /usr.new /usr

# /etc: every file is a link into /etc/static; one with a mode is a copy. The lists have the files from before, so only
# the difference is touched. (A process takes an emulated machine 20 ms: hence tar and awk.)
etc=$(readlink -f $systemConfig/etc)
etc=${etc%/etc}
touch /etc/.lab-links /etc/.lab-copies
ln -sfn $etc/etc /etc/static.new && mv -T /etc/static.new /etc/static
minus() { awk -v known="$2" 'BEGIN { while ((getline line < known) > 0) have[line] } !($0 in have)' "$1"; }
if ! cmp -s $etc/list /etc/.lab-links; then
  minus $etc/list /etc/.lab-links > /etc/.lab-new
  [ ! -s /etc/.lab-new ] || xargs tar -C $etc/links -c < /etc/.lab-new | tar -C /etc -x
  minus /etc/.lab-links $etc/list | while read -r file; do rm -f "/etc/$file"; done
  cp $etc/list /etc/.lab-links
fi
while read -r file; do
  read -r mode owner < "$etc/etc/$file.mode"
  if [ -L "/etc/$file" ] || ! cmp -s "$etc/etc/$file" "/etc/$file"; then
    case $file in */*) mkdir -p "/etc/${file%/*}" ;; esac
    cp "$etc/etc/$file" "/etc/$file.new"
    chmod "$mode" "/etc/$file.new"
    mv -f "/etc/$file.new" "/etc/$file"
  fi
done < $etc/copies
if ! cmp -s $etc/copies /etc/.lab-copies; then
  minus /etc/.lab-copies $etc/copies | while read -r file; do [ -L "/etc/$file" ] || rm -f "/etc/$file"; done
  cp $etc/copies /etc/.lab-copies
fi
hostname -F /etc/hostname

# Users: one without a uid gets the next free one, and keeps it for ever.
mkdir -p /var/lib/nixos
touch /var/lib/nixos/uid-map
awk '
  function members(group,   i, list) {
    list = ""
    for (i = 1; i <= n; i++) if (index("," extra[i] ",", "," group ",")) list = list (list == "" ? "" : ",") name[i]
    return list
  }
  function group(label, id) {
    gid[label] = id
    print label ":x:" id ":" members(label) > "/etc/group.new"
  }
  FILENAME ~ /uid-map$/ { given[$1] = $2; if ($2 > top) top = $2; print > "/var/lib/nixos/uid-map.new"; next }
  FILENAME ~ /groups$/ { more[++m] = $1; next }
  { n++; name[n] = $1; uid[n] = $2; primary[n] = $3; home[n] = $4; shell[n] = $5; extra[n] = $6 }
  END {
    group("root", 0); group("wheel", 1); group("tty", 5); group("users", 100); group("nogroup", 65534)
    for (i = 1; i <= m; i++) if (!(more[i] in gid)) group(more[i], 990 - i)
    for (i = 1; i <= n; i++) {
      if (uid[i] == "-") {
        if (!(name[i] in given)) {
          given[name[i]] = top = (top < 999 ? 1000 : top + 1)
          print name[i], top > "/var/lib/nixos/uid-map.new"
        }
        uid[i] = given[name[i]]
      }
      g = (primary[i] in gid) ? gid[primary[i]] : 65534
      print name[i] ":x:" uid[i] ":" g "::" home[i] ":" shell[i] > "/etc/passwd.new"
      print name[i] ":*:1::::::" > "/etc/shadow.new"
      if (home[i] ~ /^\/home\//) print home[i], uid[i] ":" g
    }
  }' /var/lib/nixos/uid-map /etc/lab/groups /etc/lab/users | while read -r home owner; do
    [ -d "$home" ] || { mkdir -p "$home"; chmod 700 "$home"; chown "$owner" "$home"; }
  done
chmod 600 /etc/shadow.new
[ ! -e /var/lib/nixos/uid-map.new ] || mv /var/lib/nixos/uid-map.new /var/lib/nixos/uid-map
mv /etc/group.new /etc/group; mv /etc/passwd.new /etc/passwd; mv /etc/shadow.new /etc/shadow

# The store cannot hold setuid programs, so sudo gets a setuid copy.
if ! cmp -s $systemConfig/sw/bin/sudo /run/wrappers/bin/sudo; then
  cp -L $systemConfig/sw/bin/sudo /run/wrappers/bin/sudo.new
  chmod 4755 /run/wrappers/bin/sudo.new
  mv /run/wrappers/bin/sudo.new /run/wrappers/bin/sudo
fi

