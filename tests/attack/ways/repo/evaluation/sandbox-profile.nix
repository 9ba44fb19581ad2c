# says: got .*ended
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  __sandboxProfile = "(allow default)"; __darwinAllowLocalNetworking = true; args = [ "-c" "cat @VICTIM@/state/canary @FOREIGN@ > $out 2>&1; echo ended >> $out" ];
})
