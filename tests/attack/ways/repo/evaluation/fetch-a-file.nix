# says: forbidden in restricted mode
builtins.readFile (builtins.fetchurl "file://@VICTIM@/state/canary")
