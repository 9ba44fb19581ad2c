# says: neither a branch nor a tag|deny updating a hidden ref
for ref in refs/toto/ledger refs/toto/wanted refs/replace/$(git rev-parse HEAD) refs/notes/toto refs/remotes/x; do git push toto HEAD:$ref; done
