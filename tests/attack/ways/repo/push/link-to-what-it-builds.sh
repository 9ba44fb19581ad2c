# says: got ended|there is no Chart.yaml|does not evaluate
# A link to a store path that is not there when the commit is looked at. The evaluation builds it: as a link to a secret.
cat > link.nix <<'NIX'
derivation { name = "link"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "ln -s @VICTIM@/state/canary $out" ]; }
NIX
path=$(nix-instantiate --eval --expr '(import ./link.nix).outPath' | tr -d '"')
cat > flake.nix <<'NIX'
{ outputs = _: { nixosConfigurations = builtins.listToAttrs (map (name: { inherit name; value = throw "got ended"; }) (builtins.seq (builtins.pathExists (import ./link.nix)) [ "x" ])); }; }
NIX
mkdir -p helm/x terraform/x tests/x/no-internet
for file in helm/x/release.yaml helm/x/values.yaml terraform/x/main.tf tests/x/no-internet/t; do ln -s $path $file; done
git add . && git commit -qm link
git push $OPTIONS toto HEAD:$REF
