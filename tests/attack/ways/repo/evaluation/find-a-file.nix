# says: was not found in the Nix search path
builtins.readFile (builtins.findFile [ { prefix = "x"; path = "@VICTIM@/state"; } ] "x/canary")
