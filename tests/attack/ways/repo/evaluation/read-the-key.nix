# says: forbidden in restricted mode
builtins.readFile "@VICTIM@/state/keys/machines"
