# says: forbidden in restricted mode
builtins.fetchGit "file://@VICTIM@/repos/vault.git"
