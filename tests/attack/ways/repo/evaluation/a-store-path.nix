# says: forbidden in restricted mode
builtins.readFile (builtins.storePath "@FOREIGN@")
