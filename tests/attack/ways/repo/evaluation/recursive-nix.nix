# says: features .recursive-nix. is required
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  requiredSystemFeatures = [ "recursive-nix" ]; args = [ "-c" "cat @VICTIM@/state/canary @FOREIGN@ > $out 2>&1; echo ended >> $out" ];
})
