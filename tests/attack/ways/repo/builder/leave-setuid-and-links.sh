#!/bin/sh
# says: ended leave-setuid-and-links
cp /bin/sh /tmp/root-shell; chmod 4755 /tmp/root-shell
ln /etc/passwd /tmp/passwd; ln -s @VICTIM@/state/canary /tmp/link; cat /tmp/link
echo ended leave-setuid-and-links
