# says: unable to download|Couldn.t (connect|resolve)
builtins.fetchTarball "http://localhost:@TCP@/x.tar.gz"
