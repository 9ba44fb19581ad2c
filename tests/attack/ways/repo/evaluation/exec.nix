# says: attribute 'exec' missing
builtins.exec [ "cat" "@VICTIM@/state/canary" ]
