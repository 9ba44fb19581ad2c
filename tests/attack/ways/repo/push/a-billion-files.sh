# says: has more than
tree=$(git hash-object -w machines.yaml); kind='100644 blob'
for level in 1 2 3 4 5 6 7 8 9; do
    tree=$(for number in 0 1 2 3 4 5 6 7 8 9; do printf '%s %s\t%s\n' "$kind" $tree $number; done | git mktree); kind='040000 tree'
done
(git ls-tree HEAD; printf '040000 tree %s\tbomb\n' $tree) | git mktree > ../tree
git reset -q --soft $(git commit-tree -p HEAD -m bomb $(cat ../tree))
git push $OPTIONS toto HEAD:$REF
