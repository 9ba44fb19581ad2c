# says: not in allowed-impure-host-deps
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  __impureHostDeps = [ "@VICTIM@" "/root" ]; args = [ "-c" "cat @VICTIM@/state/canary > $out" ];
})
