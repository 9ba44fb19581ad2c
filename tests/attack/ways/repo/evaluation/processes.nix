# says: forbidden in restricted mode
builtins.readFile "/proc/1/environ"
