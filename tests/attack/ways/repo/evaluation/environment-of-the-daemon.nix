# says: ended
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux"; builder = "/bin/sh";
  outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "@HASH@"; impureEnvVars = [ "CANARY" "PREFECT_API_AUTH_STRING" "HOME" "TOTO_STATE" ]; args = [ "-c" "echo $CANARY $PREFECT_API_AUTH_STRING $TOTO_STATE ended >&2; exit 1" ];
})
