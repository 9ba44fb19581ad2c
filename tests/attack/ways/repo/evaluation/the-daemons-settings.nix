# says: forbidden in restricted mode
builtins.readFile "/daemon/nix.conf"
