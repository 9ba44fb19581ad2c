# says: getting status of|forbidden in restricted mode
builtins.readFile "${derivation { name = "links"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "mkdir $out; ln -s @VICTIM@ $out/home" ]; }}/home/state/canary"
