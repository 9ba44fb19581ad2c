# says: its backend keeps the state in a file of its own|Read-only|read-only|no such file|permission denied
terraform {
  backend "local" { path = "@VICTIM@/state/new.tfstate" }
}
