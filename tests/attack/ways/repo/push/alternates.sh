# says: plan of|nothing to do|done|rehears|hasDotgit
mkdir -p objects/info hooks
echo @VICTIM@/repos/vault.git/objects > objects/info/alternates
printf '#!/bin/sh\ntouch @VICTIM@/state/new\n' > hooks/post-checkout; chmod 755 hooks/post-checkout
git add . && git commit -qm alternates
git push $OPTIONS toto HEAD:$REF
