# says: Unable to find remote state|no stored state|No stored state
data "terraform_remote_state" "other" {
  backend = "local"
  config  = { path = "@VICTIM@/state/canary" }
}
output "other" { value = data.terraform_remote_state.other }
