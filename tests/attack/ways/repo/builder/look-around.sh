#!/bin/sh
# says: ended look-around
ls -la / /root /home /run /var /etc /tmp @VICTIM@ @VICTIM@/state/keys
find / -xdev -name 'canary*' -exec cat {} \;
cat @VICTIM@/state/canary @FOREIGN@ /proc/1/environ /proc/*/environ /proc/*/cmdline
ls /nix/store | head -50
echo ended look-around
