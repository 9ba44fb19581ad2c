# says: contains a non-store path
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  exportReferencesGraph = [ "graph" "@VICTIM@/state" ]; args = [ "-c" "cat @VICTIM@/state/canary @FOREIGN@ > $out 2>&1; echo ended >> $out" ];
})
