# says: got .*ended
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  args = [ "-c" "echo @FOREIGN@ > $out; cat @FOREIGN@ >> $out 2>&1; echo ended >> $out" ]; allowedReferences = null;
})
