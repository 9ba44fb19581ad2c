# says: no branch and no tag can have this name
for ref in heads/HEAD tags/HEAD heads/FETCH_HEAD tags/ORIG_HEAD heads/@ heads/refs/toto/ledger tags/refs/heads/main heads/$(git rev-parse HEAD); do git push toto HEAD:refs/$ref; done
