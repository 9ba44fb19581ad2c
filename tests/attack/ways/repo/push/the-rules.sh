# says: no repository toto-admin that mallory may see
git push "$(git remote get-url toto | sed 's|/[^/]*$|/toto-admin|')" HEAD:main
git clone "$(git remote get-url toto | sed 's|/[^/]*$|/toto-admin|')" ../rules
git clone "$(git remote get-url toto | sed 's|/[^/]*$|/vault|')" ../vault
git clone "$(git remote get-url toto | sed 's|/[^/]*$|/../state|')" ../state
