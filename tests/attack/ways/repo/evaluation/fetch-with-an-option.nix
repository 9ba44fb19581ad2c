# says: program 'git' failed|invalid|Invalid
builtins.fetchGit { url = "https://127.0.0.1:@TCP@/x"; ref = "--upload-pack=touch"; }
