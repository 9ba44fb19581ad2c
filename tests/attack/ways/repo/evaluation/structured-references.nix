# says: is not in the Nix store
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  __structuredAttrs = true; exportReferencesGraph.graph = [ "@VICTIM@/state" ]; args = [ "-c" "cat .attrs.json; exit 1" ];
})
