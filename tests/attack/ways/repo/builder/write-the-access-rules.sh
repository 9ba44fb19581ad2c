#!/bin/sh
# says: ended write-the-access-rules
cd @VICTIM@/repos/toto-admin.git && git update-ref refs/heads/main HEAD~1
mkdir -p @VICTIM@/repos/toto-admin.git/refs/heads && echo 0 > @VICTIM@/repos/toto-admin.git/refs/heads/main
touch @VICTIM@/state/new
echo ended write-the-access-rules
