# says: program 'git' failed
builtins.fetchGit "file://@VICTIM@/repos/vault.git"
