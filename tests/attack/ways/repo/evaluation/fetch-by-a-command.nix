# says: forbidden in restricted mode
builtins.fetchGit { url = "ext::sh -c \"cat @VICTIM@/state/canary >&2\""; }
