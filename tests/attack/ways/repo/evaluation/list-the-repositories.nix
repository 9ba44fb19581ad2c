# says: forbidden in restricted mode
builtins.readDir @VICTIM@/repos
