# says: forbidden in restricted mode
builtins.path { path = "@VICTIM@/state/keys"; name = "keys"; filter = _: _: true; }
