# says: forbidden in restricted mode
import @VICTIM@/state/canary
