# says: belongs to toto|trying to write non-commit|fsck|is not a commit|refused|rejected
blob=$(echo x | git hash-object -w --stdin)
git push toto $blob:refs/heads/blob HEAD^{tree}:refs/heads/tree
