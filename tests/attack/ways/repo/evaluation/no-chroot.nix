# says: .__noChroot. set, but
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  __noChroot = true; args = [ "-c" "cat @VICTIM@/state/canary @FOREIGN@ > $out 2>&1; echo ended >> $out" ];
})
