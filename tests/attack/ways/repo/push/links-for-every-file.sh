# says: is a link that leads out of the repo|this is not a file|machines.yaml
for name in machines.yaml toto.toml; do ln -sf @VICTIM@/state/canary $name; done
mkdir -p hosts helm/x terraform/x; ln -s @VICTIM@/state/canary hosts/x.nix; ln -s @VICTIM@/state/canary helm/x/release.yaml
git add . && git commit -qm links
git push $OPTIONS toto HEAD:$REF
