# says: Could not download module|Failed to download|error downloading|not allowed
module "command" { source = "git::ext::sh -c 'cat @VICTIM@/state/canary >&2'" }
