# says: plan of|should be 1 to 63|is not a|name
mkdir -p hosts helm terraform tests
for name in '..nix' '-o.nix' 'a b.nix' '$(id).nix' "$(printf 'new\nline').nix" "$(printf '\377\376').nix" 'é.nix' 'CON.nix' "$(printf 'a%.0s' $(seq 200)).nix"; do echo '{ said = 1; }' > "hosts/$name"; done
for name in '..x' '$(id)' "$(printf '\377')" 'a b'; do mkdir -p "helm/$name" "terraform/$name"; echo '{}' > "helm/$name/release.yaml"; echo > "terraform/$name/main.tf"; done
git add . && git commit -qm names
git push $OPTIONS toto HEAD:$REF
