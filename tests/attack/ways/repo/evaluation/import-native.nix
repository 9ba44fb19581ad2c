# says: attribute 'importNative' missing
builtins.importNative "@VICTIM@/x.so" "x"
