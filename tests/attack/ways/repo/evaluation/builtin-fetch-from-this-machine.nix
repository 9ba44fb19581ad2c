# says: unable to download
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "builtin"; builder = "builtin:fetchurl"; executable = false; unpack = false;
  outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "@HASH@";
  url = "http://@ADDRESS@:@TCP@/";
})
