# says: builder for .* failed with exit code 1
builtins.readFile (derivation {
  name = "way"; once = "@ONCE@"; system = "x86_64-linux";
  builder = "@VICTIM@/state/keys/machines"; args = [ ];
})
