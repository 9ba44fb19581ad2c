# says: Could not download module|Failed to download|error downloading
module "option" { source = "git::https://127.0.0.1:@TCP@/x.git?ref=--upload-pack=touch%20@VICTIM@/state/new" }
