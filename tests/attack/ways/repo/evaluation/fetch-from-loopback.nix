# says: access to URI .*forbidden in restricted mode|unable to download|Couldn.t (connect|resolve)
builtins.readFile (builtins.fetchurl "http://127.0.0.1:@TCP@/x")
