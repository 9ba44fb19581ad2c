# says: got .*machines.yaml
# Whatever the search path leads to, all of it.
map (each: if builtins.pathExists each.path then builtins.readDir each.path else each) builtins.nixPath
