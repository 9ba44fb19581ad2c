# says: forbidden in restricted mode
builtins.fetchGit { url = "@VICTIM@/repos/vault.git"; ref = "main"; }
