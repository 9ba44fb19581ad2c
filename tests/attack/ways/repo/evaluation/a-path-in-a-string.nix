# says: forbidden in restricted mode
builtins.toFile "x" "${@VICTIM@/state/keys/machines}"
