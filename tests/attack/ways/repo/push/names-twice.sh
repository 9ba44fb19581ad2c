# says: duplicateEntries|refused|rejected|fsck
blob=$(echo x | git hash-object -w --stdin)
tree=$(printf '100644 blob %s\ta\0' $blob | git mktree -z)
raw=$(git cat-file tree $tree | xxd -p | tr -d '\n')
twice=$(printf %s%s $raw $raw | xxd -r -p | git hash-object -t tree -w --stdin --literally)
git push toto $(git commit-tree -m twice $twice):refs/heads/twice
