# says: Could not download module|Failed to download|error downloading
module "loopback" { source = "http://127.0.0.1:@TCP@/module.zip" }
