# says: nested more than 64 folders
deep=$(printf 'd/%.0s' $(seq 1500))
git update-index --add --cacheinfo 100644,$(git hash-object -w machines.yaml),${deep}file && git commit -qm deep
git push $OPTIONS toto HEAD:$REF
