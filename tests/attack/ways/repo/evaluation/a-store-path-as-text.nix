# says: forbidden in restricted mode
builtins.readFile "@FOREIGN@"
