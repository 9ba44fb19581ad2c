# says: Could not download module|Failed to download|error downloading
module "vault" { source = "git::file://@VICTIM@/repos/vault.git" }
