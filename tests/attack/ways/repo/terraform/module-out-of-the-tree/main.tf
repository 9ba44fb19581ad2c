# says: is not in the repo
module "out" { source = "../../../../../.." }
