# says: forbidden in restricted mode
builtins.filterSource (_: _: true) @VICTIM@/state
