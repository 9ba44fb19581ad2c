# says: forbidden in restricted mode
builtins.hashFile "sha256" "@VICTIM@/state/canary"
