# says: hg|forbidden in restricted mode
builtins.fetchMercurial "@VICTIM@/repos"
