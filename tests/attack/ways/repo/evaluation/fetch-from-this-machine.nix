# says: unable to download|Couldn.t (connect|resolve)
builtins.readFile (builtins.fetchurl { url = "https://@ADDRESS@:@TCP@/x"; })
