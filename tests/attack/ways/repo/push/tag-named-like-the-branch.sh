# says: would have the same name as refs/heads/main
git push toto HEAD:refs/tags/main
git push toto HEAD:refs/tags/toto/last-good
git push toto HEAD:refs/heads/toto/last-good
