# says: is a link that leads out of the repo
# A link to a store path that is not there when the commit is looked at. Its evaluation builds it: as a link to a secret.
cat > link.nix <<'NIX'
derivation { name = "link"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "ln -s @VICTIM@/state/canary $out" ]; }
NIX
cat > hosts.nix <<'NIX'
derivation {
    name = "hosts"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh"; link = import ./link.nix;
    args = [ "-c" "echo '{ x = throw \"got ended\"; }' > $out" ];
}
NIX
# A first plan has nix know both, and builds neither.
echo '{ outputs = _: { nixosConfigurations.x.config.system.build.toplevel = import ./hosts.nix; }; }' > flake.nix
git add . && git commit -qm derivations
git push -o plan -o wait toto +HEAD:refs/heads/derivations
echo '{ outputs = _: { nixosConfigurations = import (import ./hosts.nix); }; }' > flake.nix
path=$(nix-instantiate --eval --expr '(import ./link.nix).outPath' | tr -d '"')
mkdir -p helm/x terraform/x tests/x/no-internet
for file in helm/x/release.yaml helm/x/values.yaml terraform/x/main.tf tests/x/no-internet/t; do ln -s $path $file; done
git add . && git commit -qm link
git push $OPTIONS toto HEAD:$REF
