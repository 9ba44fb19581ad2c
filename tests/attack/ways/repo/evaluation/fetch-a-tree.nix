# says: attribute 'fetchTree' missing
builtins.fetchTree { type = "path"; path = "/nix/store"; }
