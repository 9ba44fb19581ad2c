# says: hasDotgit|refused|rejected|invalid path|fsck
blob=$(printf '[core]\nsshCommand = touch @VICTIM@/state/new\n' | git hash-object -w --stdin)
inner=$(printf '100644 blob %s\tconfig\n' $blob | git mktree)
for name in .git .GIT '.git ' git~1 ..; do
    tree=$(printf '040000 tree %s\t%s\n' $inner "$name" | git mktree)
    git push toto $(git commit-tree -m "$name" $tree):refs/heads/dotgit
done
