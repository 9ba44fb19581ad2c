# says: plan of|nothing to do|done|rehears
# A filter of toto's user (its ~/.gitconfig has one), words to expand, and bytes to change.
printf '* filter=evil export-subst ident working-tree-encoding=UTF-16\n.gitattributes -filter -working-tree-encoding\n*.yaml -working-tree-encoding\n*.toml -working-tree-encoding\n*.nix -working-tree-encoding\n' > .gitattributes
printf '[lfs]\nurl = http://127.0.0.1:@TCP@/\n' > .lfsconfig
git add . && git commit -qm filters
git push $OPTIONS toto HEAD:$REF
