# says: got false
builtins.pathExists "@VICTIM@/state/keys/machines" || builtins.pathExists "@FOREIGN@"
