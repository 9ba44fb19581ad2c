# says: is a link that leads out of the repo
mkdir -p tests/x/no-internet; ln -s @VICTIM@/state/canary tests/x/no-internet/link
git add . && git commit -qm link
git push $OPTIONS toto HEAD:$REF
