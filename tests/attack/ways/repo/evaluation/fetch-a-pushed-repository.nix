# says: program 'git' failed
# Its settings name commands: in a bare repository that is committed as files, git would run some of them.
builtins.fetchGit { url = "/infra/bare.git"; ref = "main"; }
