# says: forbidden in restricted mode
(derivation { name = "x"; system = "x86_64-linux"; builder = "/bin/sh"; src = @VICTIM@/state/canary; }).drvPath
