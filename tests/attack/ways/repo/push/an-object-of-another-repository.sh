# says: missing|not our ref|did not|unpack|rejected|bad object
# A commit whose parent is in the other repository only: it must neither be found there nor be read.
tree=$(git write-tree)
commit=$(printf 'tree %s\nparent @VAULT@\nauthor a <a@b> 0 +0000\ncommitter a <a@b> 0 +0000\n\nx\n' $tree | git hash-object -t commit -w --stdin)
git push toto $commit:refs/heads/parent
git fetch toto @VAULT@
