# says: getting status of|forbidden in restricted mode
# What it builds is a link to a secret, which is then read by its own name.
builtins.readFile (derivation { name = "link"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "ln -s @VICTIM@/state/canary $out" ]; })
